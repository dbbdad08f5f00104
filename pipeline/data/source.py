"""The nouns of this room: what is asked for, what was found, and what is said of each row."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pyarrow as pa

from sere.conf.schema import DataFormat

Kind = Literal["parquet", "json", "csv", "text", "huggingface"]
Bounds = dict[str, tuple[int, int]]
"""Lowest and highest integer of columns, and of what is nested in them (`COLUMN.item` of a list, `COLUMN.FIELD`); of instants
and spans of time in nanoseconds. What is not there is not known."""
PROBLEM = "sere_problem"
"""Column of the reader: what is wrong with a row that cannot be read, "" if nothing is."""
PROMPT = "sere_prompt"
"""Column with a row's prompt, while rows are put in order of prompts."""
FILE_NUMBER = "sere_file"
"""Column with the number of a row's file, while rows are put in order."""
PLACE = pa.schema([("source_file", pa.string()), ("source_row", pa.int64())])
"""Columns of the reader: a row's file and its position there, which never change."""


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """Where input is; every job makes one from its config."""

    data: str
    """Files, a folder or a glob of them, or a Hugging Face dataset, each also as an fsspec URI."""
    text_column: str
    """Where lines of a text file go."""
    data_format: DataFormat = "auto"
    data_split: str = "train"
    data_revision: str | None = None
    storage_options: dict[str, Any] = field(default_factory=dict)
    checks_text: bool = True
    """Whether a value of `text_column` that is not text is a problem of its row."""


@dataclass(frozen=True)
class SourceFile:
    """A file, or a split of a Hugging Face dataset. `find_sources` fills name and path, `describe_file` the rest."""

    name: str
    """What ids are made of: the path below the folder that all files share."""
    path: str
    """For the file system of `Source.data`."""
    num_rows: int = 0
    fingerprint: str = ""
    """Of the contents, where they can be read cheaply; else what the file system says changes with them."""
    schema: pa.Schema | None = None
    """Of the file alone, without its partition."""
    bounds: Bounds = field(default_factory=dict)
    stamp: str = ""
    """What the file system says changes with the contents; "" where it says nothing that can be relied on."""
    int96_unit: str = "ns"
    """Unit that holds all of its timestamps of 96 bits."""
    partition: dict[str, str | None] = field(default_factory=dict)
    """Columns that the names of its folders give: `split=train/`."""
    starts: tuple[int, ...] = ()
    """Rows beside the first at which it can be read from: those that begin some of its row groups."""

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """What can be read on its own: first row and end."""
        starts = [0, *(start for start in self.starts if 0 < start < self.num_rows)]
        return list(zip(starts, [*starts[1:], self.num_rows], strict=True))


@dataclass(frozen=True)
class Source:
    """The input: files of one kind. Picklable."""

    kind: Kind
    files: tuple[SourceFile, ...]
    spec: InputSpec
    schema: pa.Schema | None = None
    """The columns of all files together, from `scan_input`."""
    commit: str | None = None
    """Of a dataset of the hub; `spec` says the same."""

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Per file what tells it from another of the same name."""
        commit = [] if self.commit is None else [f"commit={self.commit}"]
        return {
            file.name: ", ".join(
                [f"{file.num_rows} rows", file.fingerprint, *(f"{k}={v}" for k, v in file.partition.items()), *commit]
            )
            for file in self.files
        }

    @property
    def earlier_fingerprints(self) -> dict[str, str]:
        """Those that jobs noted which were begun before there were commits, where they differ from today's."""
        return replace(self, commit=None).fingerprints if self.commit is not None else {}
