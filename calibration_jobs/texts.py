"""Calibration text: which files there are, the rows in them, and what is wrong with the unusable ones."""

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sere.conf.errors import ConfigError
from sere.conf.schema import CalibrateConfig

_SUFFIXES = {".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".json": "json"}


def find_files(data: str) -> tuple[str, list[Path]]:
    """The files behind a path, folder or glob, and their kind: parquet or json (one object a line).

    Raises:
        ConfigError: if there are none, or of several kinds.
    """
    path = Path(data)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES)
    else:
        files = sorted(Path(file) for file in glob.glob(data, recursive=True))
    if not files:
        raise ConfigError(
            f"no data at {data} (seen from {Path.cwd()}): give a parquet or JSONL file, a folder of them, or a glob"
        )
    kinds = {_SUFFIXES.get(file.suffix, file.suffix or "no suffix") for file in files}
    if len(kinds) > 1 or not kinds <= {"parquet", "json"}:
        raise ConfigError(f"data must be all parquet or all JSONL, {data} has {', '.join(sorted(kinds))}")
    return kinds.pop(), files


@dataclass(frozen=True)
class TextRow:
    """A usable row."""

    file: str
    number: int
    """Within its file, from 0."""
    text: str
    domain: str


@dataclass(frozen=True)
class RowRemark:
    """What was wrong with a row, and what was done about it."""

    file: str
    number: int
    remark: str


def _rows(kind: str, files: list[Path]) -> Iterator[tuple[Path, int, Any]]:
    """File, number within it and content of each row: a dict, or None for a line that is no JSON."""
    for file in files:
        if kind == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                number = 0
                with pq.ParquetFile(file) as opened:
                    for batch in opened.iter_batches(batch_size=1000):
                        for row in batch.to_pylist():
                            yield file, number, row
                            number += 1
            except (pa.ArrowException, OSError) as error:
                raise ConfigError(f"{file} cannot be read ({str(error).splitlines()[0]}): it is empty or damaged") from error
        else:
            # Line by line: a reader of whole blocks stops at the first line whose types differ.
            with file.open(encoding="utf-8", errors="replace") as lines:
                for number, line in enumerate(lines):
                    try:
                        yield file, number, json.loads(line)
                    except ValueError:
                        yield file, number, None


def read_rows(config: CalibrateConfig) -> tuple[list[TextRow], list[RowRemark]]:
    """The first `num_sequences` usable rows, in order, and the unusable ones among them: null, empty, not text.

    Raises:
        ConfigError: if there is no such file or column, or no usable row.
    """
    kind, files = find_files(config.data)
    remarks: list[RowRemark] = []

    def usable() -> Iterator[TextRow]:
        for file, number, row in _rows(kind, files):
            problem, text, domain = None, None, ""
            if not isinstance(row, dict):
                problem = "not a JSON object"
            elif config.text_column not in row and (kind == "parquet" or number == 0):
                raise ConfigError(f"{file} has no column {config.text_column!r} (there: {', '.join(row)}): set text_column")
            else:
                text = row.get(config.text_column)
                if text is None:
                    problem = "null"
                elif not isinstance(text, str):
                    problem = f"not text but {type(text).__name__}"
                elif not text.strip():
                    problem = "empty"
                if config.domain_column is not None:
                    if config.domain_column not in row:
                        raise ConfigError(f"{file}: row {number} has no column {config.domain_column!r}: set domain_column")
                    domain = str(row[config.domain_column])
            if problem is None and text is not None:
                yield TextRow(str(file), number, text, domain)
            else:
                remarks.append(RowRemark(str(file), number, f"skipped: {problem}"))

    rows = list(islice(usable(), config.num_sequences))
    if not rows:
        reason = f"all {len(remarks)} rows are unusable, the first is {remarks[0].remark}" if remarks else "there are no rows"
        raise ConfigError(f"{config.data} has no usable text in {config.text_column!r}: {reason}")
    return rows, remarks
