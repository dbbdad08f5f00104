"""Ray tasks that look at rows where they lie, so that they need not pass through the driver."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from sere.pipeline.generate.attempts import Tries
from sere.pipeline.generate.dispatch.again import split_by_tries
from sere.pipeline.generate.dispatch.work import Batch, Rows, joined
from sere.pipeline.generate.parts import KEY, Parts


def left_of(parts: Parts, replica: str, batches: Sequence[Rows]) -> tuple[int, list[Rows]]:
    """What a dead replica has written, and what is left of each of its batches.

    Args:
        parts: Of the job.
        replica: The replica's name.
        batches: Rows it had.

    Returns:
        Number of rows in its parts, and for each batch the rows that are in none of them.
    """
    import ray

    take_out = ray.remote(num_cpus=0.5, num_returns=2 + len(batches))(_take_out)
    spans, blocks = [rows.arguments()[0] for rows in batches], [block for rows in batches for block in rows.arguments()[1]]
    num_written, lengths, *tables = take_out.remote(parts, replica, spans, *blocks)
    lengths = ray.get(lengths)
    left = [
        rows if length == len(rows) else Rows(((table, 0, length),) if length else ())
        for rows, table, length in zip(batches, tables, lengths, strict=True)
    ]
    return ray.get(num_written), left


def _take_out(parts: Parts, replica: str, spans: list[list[tuple[int, int]]], *blocks: pa.Table) -> tuple[Any, ...]:
    """Number of rows written, rows left of each batch, and those rows (None where they are all, or none)."""
    names = parts.names(f"{replica}-")
    written = {
        key for table in parts.read_all(names, KEY) for key in zip(*(table[column].to_pylist() for column in KEY), strict=True)
    }
    lengths, tables, start = [], [], 0
    for pieces in spans:
        table = joined(pieces, blocks[start : start + len(pieces)])
        start += len(pieces)
        keys = zip(*(table[column].to_pylist() for column in KEY), strict=True)
        keep = pa.array([key not in written for key in keys], pa.bool_())
        lengths.append(sum(keep.to_pylist()))
        tables.append(table.filter(keep) if 0 < lengths[-1] < len(table) else None)
    return (len(written), lengths, *tables)


class Split:
    """Makes batches of rows as they are read; see `split_by_tries`."""

    def __init__(self, tries: Tries, *, max_retries: int) -> None:
        """What earlier sessions died with, and how often rows are tried as before."""
        self._tries, self._max_retries = tries, max_retries
        self._num_awaited = sum(len(rows) for rows in tries.values())

    def __call__(self, rows: Rows) -> list[Batch]:
        """The batches; keys are asked for only until all rows that somebody died with have come."""
        if not self._num_awaited:
            return [Batch(rows)]
        import ray

        spans, blocks = rows.arguments()
        keys = ray.get(ray.remote(num_cpus=0.5)(_keys).remote(spans, *blocks))
        batches = split_by_tries(rows, keys, self._tries, max_retries=self._max_retries)
        self._num_awaited -= sum(len(batch.rows) for batch in batches if batch.num_tries)
        return batches


def _keys(spans: list[tuple[int, int]], *blocks: pa.Table) -> pa.Table:
    return joined(spans, [block.select(KEY) for block in blocks]).combine_chunks()
