"""What kinds of input there are, for every job."""

from typing import Literal

DataFormat = Literal["auto", "parquet", "json", "csv", "text", "huggingface"]
