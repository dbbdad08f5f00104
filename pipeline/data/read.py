"""Reads a file: once to describe it, once more for its rows as tables. Plain functions; Ray tasks call them.

Every row has a place that never changes: the name of its file and its position in it. Rows that cannot be read keep their
place, with the reason in column `sere_problem`.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sere.conf.errors import ConfigError
from sere.conf.masking import mask_uri
from sere.pipeline.data.hub import load_dataset
from sere.pipeline.data.lines import read_lines
from sere.pipeline.data.source import PLACE, PROBLEM, Source, SourceFile
from sere.pipeline.data.widen import array_of, fit, plain, schema_of, widen
from sere.pipeline.runtime.storage import first_line, open_filesystem

_SCAN_ROWS = 5_000
# What stores call that which changes with a file's content.
_TAGS = ("ETag", "etag", "md5Hash", "Content-MD5", "LastModified", "Last-Modified", "mtime", "created")


def describe_file(source: Source, index: int) -> SourceFile:
    """Read a file once: its rows, its fingerprint, its columns.

    Raises:
        ConfigError: if it cannot be read.
    """
    file = source.files[index]
    with naming_file(file):
        if source.kind == "huggingface":
            dataset = load_dataset(source.spec)
            schema = dataset.features.arrow_schema.remove_metadata()
            return replace(file, num_rows=len(dataset), fingerprint=dataset._fingerprint, schema=plain(schema))
        filesystem, _ = open_filesystem(source.spec.data, source.spec.storage_options)
        described = replace(file, fingerprint=_fingerprint(filesystem, file.path))
        if source.kind == "parquet":
            with filesystem.open(file.path, "rb") as opened, pq.ParquetFile(opened) as parquet:
                return replace(described, num_rows=parquet.metadata.num_rows, schema=plain(parquet.schema_arrow))
        num_rows, schema = 0, None
        rows = read_lines(source, file)
        while chunk := list(islice(rows, _SCAN_ROWS)):
            num_rows += len(chunk)
            schema = widen(schema, schema_of([row for row, _ in chunk if row is not None]))
        return replace(described, num_rows=num_rows, schema=schema or pa.schema([]))


@contextmanager
def naming_file(file: SourceFile) -> Iterator[None]:
    """Make whatever goes wrong in the block a ConfigError that names the file."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        # Arrow, file systems and decompression have errors of their own.
        reason = mask_uri(first_line(error))
        raise ConfigError(f"{mask_uri(file.path)} cannot be read ({reason}): mend the file, or leave it out of data") from error


def read_file(source: Source, index: int, *, rows_per_table: int, skip: np.ndarray | None = None) -> Iterator[pa.Table]:
    """A file's rows in order: the input's columns, `source_file`, `source_row` and `sere_problem` ("" if there is none).

    Args:
        source: From `scan_input`.
        index: Of the file.
        rows_per_table: Most rows of a table.
        skip: int64, sorted: positions that are left out.

    Raises:
        ConfigError: if the file cannot be read.
    """
    assert source.schema is not None
    file = source.files[index]
    start = 0
    with naming_file(file):
        for table, problems in read_tables(source, file, rows_per_table):
            table = table.slice(0, file.num_rows - start)
            positions = np.arange(start, start + len(table))
            start += len(table)
            keep = np.ones(len(table), bool) if skip is None else ~np.isin(positions, skip, assume_unique=True)
            if keep.any():
                columns = [fit(table, field) for field in source.schema]
                names = pa.array([file.name], pa.string()).take(pa.array(np.zeros(len(table), np.int64)))
                problem = pa.array((problems or [""] * len(table))[: len(table)], pa.string())
                whole = pa.table(
                    [*columns, names, pa.array(positions, pa.int64()), problem],
                    schema=pa.schema([*source.schema, *PLACE, (PROBLEM, pa.string())]),
                )
                yield whole.filter(pa.array(keep))
            if start >= file.num_rows:
                return
        raise ConfigError(f"{file.name} has become shorter: it had {file.num_rows} rows, and now {start}")


def read_tables(source: Source, file: SourceFile, rows_per_table: int) -> Iterator[tuple[pa.Table, list[str] | None]]:
    """A file's rows as they are, and what is wrong with each ("" if nothing is; None: with none).

    Args:
        source: With a schema from `scan_input`, or without: then every table of a file of lines has a schema of its own.
        file: One of its files.
        rows_per_table: Most rows of a table.
    """
    if source.kind == "huggingface":
        dataset = load_dataset(source.spec).with_format("arrow")
        for start in range(0, len(dataset), rows_per_table):
            yield dataset[start : start + rows_per_table], None
    elif source.kind == "parquet":
        filesystem, _ = open_filesystem(source.spec.data, source.spec.storage_options)
        with filesystem.open(file.path, "rb") as opened, pq.ParquetFile(opened) as parquet:
            for batch in parquet.iter_batches(batch_size=rows_per_table):
                yield pa.Table.from_batches([batch]), None
    else:
        rows = read_lines(source, file)
        while chunk := list(islice(rows, rows_per_table)):
            dicts, problems = [row or {} for row, _ in chunk], [problem for _, problem in chunk]
            schema = source.schema if source.schema is not None else schema_of(dicts)
            arrays = [array_of([row.get(field.name) for row in dicts], field.type) for field in schema]
            if source.kind == "json" and source.spec.checks_text:
                name = source.spec.text_column
                for index, row in enumerate(dicts):
                    value = row.get(name)
                    if value is not None and not isinstance(value, str):
                        problems[index] = f"{name} is not text but {type(value).__name__}"
            yield pa.table(arrays, schema=schema), problems


def _fingerprint(filesystem: Any, path: str) -> str:
    if "file" not in filesystem.protocol:
        # fsspec's `ukey` covers all that a store says, which is more when a file is asked for than when its folder is listed.
        info = filesystem.info(path)
        tag = next((info[name] for name in _TAGS if info.get(name)), None)
        return f"{info.get('size')} bytes, {tag}" if tag else str(filesystem.ukey(path))
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
