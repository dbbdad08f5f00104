"""Reads a file once to describe it: its rows, its columns, how large its integers are, and what tells it from another."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sere.pipeline.data.hub import load_dataset
from sere.pipeline.data.infer import infer_schema
from sere.pipeline.data.lines import read_lines
from sere.pipeline.data.opened import fingerprint_of, open_input, open_parquet, stamp_of
from sere.pipeline.data.read import naming_file
from sere.pipeline.data.source import Bounds, Source, SourceFile
from sere.pipeline.data.widen import is_list, limits, merge, nanoseconds, plain_schema, widen

_SCAN_ROWS = 5_000
# Larger files are read by several tasks.
_PIECE_BYTES = 256 * 2**20


def describe_file(source: Source, index: int) -> SourceFile:
    """Read a file once.

    Raises:
        ConfigError: if it cannot be read, or no row of it can.
    """
    file = source.files[index]
    with naming_file(file):
        if source.kind == "huggingface":
            dataset = load_dataset(source.spec)
            schema = plain_schema(dataset.features.arrow_schema)
            return replace(file, num_rows=len(dataset), fingerprint=dataset._fingerprint, schema=schema)
        filesystem, _ = open_input(source.spec)
        # Before it is read: what changes meanwhile is noticed when it is read again.
        described = replace(file, stamp=stamp_of(filesystem, file.path), fingerprint=fingerprint_of(filesystem, file.path))
        if source.kind == "parquet":
            return _describe_parquet(source, described)
        return _describe_lines(source, described)


def _describe_lines(source: Source, file: SourceFile) -> SourceFile:
    num_rows = num_bad = 0
    first_problem = ""
    schema = pa.schema([])
    bounds: Bounds = {}
    rows = read_lines(source, file)
    while chunk := list(islice(rows, _SCAN_ROWS)):
        good = [row for row, _ in chunk if row is not None]
        first_problem = first_problem or next((problem for _, problem in chunk if problem), "")
        num_rows, num_bad = num_rows + len(chunk), num_bad + len(chunk) - len(good)
        found = infer_schema(good, bounds)
        schema = widen(schema, found, bounds)
    if num_bad and num_bad == num_rows:
        raise ValueError(f"none of its {num_rows} rows can be read: {first_problem}")
    return replace(file, num_rows=num_rows, schema=schema, bounds=bounds)


def _describe_parquet(source: Source, file: SourceFile) -> SourceFile:
    with open_parquet(source.spec, file.path, file.int96_unit) as parquet:
        parts = [parquet.schema.column(number) for number in range(len(parquet.schema))]
        wide = [part.path for part in parts if part.physical_type == "INT96"]
        if wide and file.int96_unit == "ns":
            with open_parquet(source.spec, file.path, "us") as coarse:
                if not _fits_nanoseconds(parquet, coarse, wide):
                    return _describe_parquet(source, replace(file, int96_unit="us"))
        schema = plain_schema(parquet.schema_arrow)
        bounds = _parquet_bounds(schema, parquet.metadata)
        starts = _starts(parquet.metadata)
        return replace(file, num_rows=parquet.metadata.num_rows, schema=schema, bounds=bounds, starts=starts)


def _starts(metadata: Any) -> tuple[int, ...]:
    """First rows of row groups that are at least `_PIECE_BYTES` apart."""
    starts, row, num_bytes = [], 0, 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if num_bytes >= _PIECE_BYTES:
            starts.append(row)
            num_bytes = 0
        row, num_bytes = row + group.num_rows, num_bytes + group.total_byte_size
    return tuple(starts)


def _fits_nanoseconds(fine: pq.ParquetFile, coarse: pq.ParquetFile, columns: list[str]) -> bool:
    """Whether every instant of columns is one in nanoseconds of 64 bits: Arrow would make another of it.

    Args:
        fine: The file, read in nanoseconds.
        coarse: In microseconds.
        columns: Of timestamps of 96 bits.

    Raises:
        ValueError: if not, and some fall between two microseconds.
    """
    fits = exact = True
    batches = (parquet.iter_batches(batch_size=_SCAN_ROWS, columns=columns) for parquet in (fine, coarse))
    for in_ns, in_us in zip(*batches, strict=True):
        for one, other in zip(in_ns.columns, in_us.columns, strict=True):
            try:
                other.cast(one.type)
            except pa.ArrowInvalid:
                fits = False
            # Both have lost the same, if anything.
            exact = exact and other.cast(one.type, safe=False).equals(one)
    if not (fits or exact):
        raise ValueError(f"{', '.join(columns)}: some timestamps are beyond the year 2262, others finer than microseconds")
    return fits


def _parquet_bounds(schema: pa.Schema, metadata: Any) -> Bounds:
    """From the statistics in the file's footer; where there are none, what the type allows."""
    bounds: Bounds = {}
    leaves = [leaf for field in schema for leaf in _leaves(field.type, field.name)]
    known = len(leaves) == metadata.num_columns
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    for column, (path, kind) in enumerate(leaves):
        allowed = limits(kind)
        if allowed is None:
            continue
        # Narrower integers are doubles anyway.
        reads = known and kind.bit_width == 64
        found = [_group_bounds(group.column(column), kind) if reads else allowed for group in groups]
        for low, high in [pair or allowed for pair in found if pair != ()] or [(0, 0)]:
            merge(bounds, path, low, high)
    return bounds


def _group_bounds(column: Any, kind: pa.DataType) -> tuple[int, int] | tuple[()] | None:
    """Of a column in a row group; empty if it has no values, None if its bounds are not known."""
    statistics = column.statistics
    if statistics is None or column.physical_type != "INT64":
        return None
    if not statistics.has_min_max:
        return () if statistics.has_null_count and statistics.null_count == column.num_values else None
    if pa.types.is_integer(kind):
        return statistics.min, statistics.max
    return statistics.min_raw * nanoseconds(kind), statistics.max_raw * nanoseconds(kind)


def _leaves(kind: pa.DataType, path: str) -> Iterator[tuple[str, pa.DataType]]:
    """What parquet has a column for, in its order, with the paths that `join` looks up."""
    if isinstance(kind, pa.BaseExtensionType):
        yield from _leaves(kind.storage_type, path)
    elif pa.types.is_struct(kind):
        for field in kind:
            yield from _leaves(field.type, f"{path}.{field.name}")
    elif pa.types.is_map(kind):
        yield from _leaves(kind.key_type, f"{path}.key")
        yield from _leaves(kind.item_type, f"{path}.item")
    elif is_list(kind):
        yield from _leaves(kind.value_type, f"{path}.item")
    else:
        yield path, kind
