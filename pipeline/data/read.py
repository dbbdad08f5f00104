"""Reads a file's rows as tables. Plain functions; Ray tasks call them.

Every row has a place that never changes: the name of its file and its position in it. Rows that cannot be read keep their
place, with the reason in column `sere_problem`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from sere.conf.errors import ConfigError
from sere.conf.masking import mask_uri
from sere.pipeline.data.fit import fit
from sere.pipeline.data.hive import add_partition
from sere.pipeline.data.hub import load_dataset
from sere.pipeline.data.infer import array_of, infer_schema, storable
from sere.pipeline.data.lines import read_lines
from sere.pipeline.data.opened import fingerprint_of, open_input, open_parquet, stamp_of
from sere.pipeline.data.source import PLACE, PROBLEM, Source, SourceFile
from sere.pipeline.data.widen import plain_schema
from sere.pipeline.runtime.storage import first_line


@contextmanager
def naming_file(file: SourceFile) -> Iterator[None]:
    """Make whatever goes wrong in the block a ConfigError that names the file."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        # Arrow, file systems and decompression have errors of their own.
        reason = "it is not there" if isinstance(error, FileNotFoundError) else mask_uri(first_line(error))
        raise ConfigError(f"{mask_uri(file.path)} cannot be read ({reason}): mend the file, or leave it out of data") from error


def read_file(
    source: Source,
    index: int,
    *,
    rows_per_table: int,
    skip: np.ndarray | None = None,
    piece: tuple[int, int] | None = None,
) -> Iterator[pa.Table]:
    """A file's rows in order: the input's columns, `source_file`, `source_row` and `sere_problem` ("" if there is none).

    Args:
        source: From `scan_input`.
        index: Of the file.
        rows_per_table: Most rows of a table.
        skip: int64, sorted: positions that are left out.
        piece: One of the file's `pieces`; None: all of it.

    Raises:
        ConfigError: if the file cannot be read, or is not what was described.
    """
    assert source.schema is not None
    file = source.files[index]
    start, end = piece or (0, file.num_rows)
    with naming_file(file):
        _check_unchanged(source, file)
        for table, problems in read_tables(source, file, rows_per_table, first_row=start):
            table = table.slice(0, end - start)
            positions = np.arange(start, start + len(table))
            start += len(table)
            keep = np.ones(len(table), bool)
            if skip is not None:
                first, last = np.searchsorted(skip, (start - len(table), start))
                keep[skip[first:last] - (start - len(table))] = False
            if keep.any():
                columns = [fit(table, field) for field in source.schema]
                names = pa.array([file.name], pa.string()).take(pa.array(np.zeros(len(table), np.int64)))
                problem = pa.array((problems or [""] * len(table))[: len(table)], pa.string())
                whole = pa.table(
                    [*columns, names, pa.array(positions, pa.int64()), problem],
                    schema=pa.schema([*source.schema, *PLACE, (PROBLEM, pa.string())]),
                )
                yield whole.filter(pa.array(keep))
            if start >= end:
                return
        raise _changed(file, f"it had {file.num_rows} rows, and now {start}")


def _check_unchanged(source: Source, file: SourceFile) -> None:
    """Without reading it, unless the file system says that it may have changed.

    Raises:
        ConfigError: if it has.
    """
    if file.stamp:
        filesystem, _ = open_input(source.spec)
        if stamp_of(filesystem, file.path) != file.stamp and fingerprint_of(filesystem, file.path) != file.fingerprint:
            raise _changed(file, "it holds other bytes")


def _changed(file: SourceFile, how: str) -> ConfigError:
    return ConfigError(
        f"{mask_uri(file.path)} has changed since the job looked at it ({how}): put it back, or begin anew with overwrite=true"
    )


def read_tables(
    source: Source, file: SourceFile, rows_per_table: int, *, first_row: int = 0
) -> Iterator[tuple[pa.Table, list[str] | None]]:
    """A file's rows as they are, and what is wrong with each ("" if nothing is; None: with none).

    Args:
        source: With a schema from `scan_input`, or without: then every table of a file of lines has a schema of its own.
        file: One of its files.
        rows_per_table: Most rows of a table.
        first_row: Where to begin: where one of the file's `pieces` does.
    """
    for table, problems in _read_plain(source, file, rows_per_table, first_row):
        num_rows = len(table) if problems is None else len(problems)
        yield add_partition(table, num_rows, file, source.schema), problems


def _read_plain(
    source: Source, file: SourceFile, rows_per_table: int, first_row: int
) -> Iterator[tuple[pa.Table, list[str] | None]]:
    """Without the columns that folders give."""
    if source.kind == "huggingface":
        dataset = load_dataset(source.spec).with_format("arrow")
        for start in range(0, len(dataset), rows_per_table):
            yield dataset[start : start + rows_per_table], None
    elif source.kind == "parquet":
        with open_parquet(source.spec, file.path, file.int96_unit) as parquet:
            if file.schema is not None and not plain_schema(parquet.schema_arrow).equals(file.schema):
                raise _changed(file, "it holds other columns")
            groups = _groups_from(parquet.metadata, first_row)
            if groups is None:
                raise _changed(file, f"no row group begins at row {first_row}")
            for batch in parquet.iter_batches(batch_size=rows_per_table, row_groups=groups):
                yield pa.Table.from_batches([batch]), None
    else:
        rows = read_lines(source, file)
        while chunk := list(islice(rows, rows_per_table)):
            dicts, problems = [row or {} for row, _ in chunk], [problem for _, problem in chunk]
            yield _lines_table(source, file, dicts), _check_text(source, dicts, problems)


def _groups_from(metadata: Any, first_row: int) -> list[int] | None:
    """Numbers of the row groups from the one on that begins with a row; None if none does."""
    row = 0
    for number in range(metadata.num_row_groups):
        if row == first_row:
            return list(range(number, metadata.num_row_groups))
        row += metadata.row_group(number).num_rows
    return [] if row == first_row else None


def _lines_table(source: Source, file: SourceFile, rows: list[dict[str, Any]]) -> pa.Table:
    if source.schema is None:
        schema = storable(infer_schema(rows, {}))
    else:
        schema = pa.schema([field for field in source.schema if field.name not in file.partition])
        unknown = {name for row in rows for name in row}.difference(schema.names)
        if unknown:
            raise _changed(file, f"it had no column {min(unknown)!r}")
    arrays = []
    for field in schema:
        try:
            arrays.append(array_of([row.get(field.name) for row in rows], field.type))
        except ValueError as error:
            raise _changed(file, f"column {field.name!r}: {error}") from error
    return pa.table(arrays, schema=schema)


def _check_text(source: Source, rows: list[dict[str, Any]], problems: list[str]) -> list[str]:
    if source.kind != "json" or not source.spec.checks_text:
        return problems
    name = source.spec.text_column
    return [
        problem if row.get(name) is None or isinstance(row[name], str) else f"{name} is not text but {type(row[name]).__name__}"
        for row, problem in zip(rows, problems, strict=True)
    ]
