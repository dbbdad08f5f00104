"""Ray tasks that look at rows where they lie, so that they need not pass through the driver."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from sere.conf.errors import ConfigError, TryAgainError
from sere.pipeline.generate.attempts import Tries
from sere.pipeline.generate.dispatch.again import split_by_tries
from sere.pipeline.generate.dispatch.work import Batch, Rows, joined, reason
from sere.pipeline.generate.parts import KEY, Parts


def left_of(parts: Parts, replica: str, batches: Sequence[Rows]) -> tuple[int, list[Rows]]:
    """What a dead replica has written, and what is left of each of its batches.

    Args:
        parts: Of the job.
        replica: The replica's name.
        batches: Rows it had.

    Returns:
        Number of rows in its parts, and for each batch the rows that are in none of them.

    Raises:
        TryAgainError: if parts cannot be read, or rows were lost with their node.
    """
    import ray

    # It takes no core: all that are left may be held by tasks that read, and wait for rows to be taken.
    take_out = ray.remote(num_cpus=0, num_returns=2 + len(batches))(_take_out)
    spans, blocks = [rows.arguments()[0] for rows in batches], [block for rows in batches for block in rows.arguments()[1]]
    num_written, lengths, *tables = take_out.remote(parts, replica, spans, *blocks)
    num_written, lengths = found(num_written), found(lengths)
    left = [
        rows if length == len(rows) else Rows(((table, 0, length),) if length else ())
        for rows, table, length in zip(batches, tables, lengths, strict=True)
    ]
    return num_written, left


def read(rows: Rows) -> pa.Table:
    """The rows themselves, in this process.

    Raises:
        TryAgainError: if they were lost with their node.
    """
    spans, blocks = rows.arguments()
    return joined(spans, [found(block) for block in blocks])


def found(reference: Any) -> Any:
    """What a reference stands for.

    Raises:
        ConfigError: what the task raised, if that is one.
        TryAgainError: if it failed in another way, or its result is lost.
    """
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ConfigError):
            raise cause from None
        raise TryAgainError(
            f"rows that were being answered cannot be read any more ({reason(error)}): run the same command again; what is "
            "finished is kept"
        ) from error


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

    def __call__(self, batch: Batch) -> list[Batch]:
        """The batches; keys are asked for only until all rows that somebody died with have come."""
        if not self._num_awaited:
            return [batch]
        import ray

        spans, blocks = batch.rows.arguments()
        keys = found(ray.remote(num_cpus=0)(_keys).remote(spans, *blocks))
        batches = split_by_tries(batch.rows, keys, self._tries, max_retries=self._max_retries)
        self._num_awaited -= sum(len(some.rows) for some in batches if some.num_tries)
        return [dataclasses.replace(some, place=batch.place, shared=batch.shared) for some in batches]


def _keys(spans: list[tuple[int, int]], *blocks: pa.Table) -> pa.Table:
    return joined(spans, [block.select(KEY) for block in blocks]).combine_chunks()
