"""Batches of rows that are in order of their prompts: cut where prompts share little, each with what it shares with the one
before it.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa

from sere.pipeline.data.source import PROMPT
from sere.pipeline.generate.dispatch.work import Batch, Rows, joined

# As much of a batch is filled in any case.
_LEAST_FULL = 3 / 4
# A batch ends earlier only if what is then shared with the next is less by this share.
_MUCH_LESS = 1 / 8
# Bytes below which two prompts share nothing: a block of a prefix cache has 16 tokens or more, of about four bytes.
_LEAST_SHARED = 64


def measure(blocks: Iterable[Rows]) -> Iterator[tuple[Rows, np.ndarray]]:
    """Rows in order of their prompts, and how much each shares with the one before it. Prompts do not pass through here.

    Args:
        blocks: Tables in Ray's object store with column `PROMPT`, which the rows that come out lack.

    Yields:
        The rows, and int32 `[num_rows]`, bytes that a row's prompt has in common, from its beginning, with that of the row
        before it; that may be in the block before.
    """
    import ray

    # It takes no core: all that are left may be held by tasks that read, and wait for rows to be taken.
    take_off = ray.remote(num_cpus=0, num_returns=3)(_take_off)
    last = None
    for rows in blocks:
        spans, tables = rows.arguments()
        table, shared, last = take_off.remote(spans, last, *tables)
        yield Rows(((table, 0, len(rows)),)), ray.get(shared)


def _take_off(spans: list[tuple[int, int]], last: bytes | None, *tables: pa.Table) -> tuple[pa.Table, np.ndarray, bytes]:
    """The table without the prompts (bytes), what each shares with the one before it, and the last prompt."""
    table = joined(spans, tables)
    prompts = table[PROMPT].to_pylist()
    shared = [num_shared(one, other) for one, other in pairwise([last or b"", *prompts])]
    return table.drop_columns([PROMPT]).combine_chunks(), np.array(shared, np.int32), prompts[-1]


def num_shared(one: bytes, other: bytes) -> int:
    """Bytes that two texts have in common, from their beginning."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    differ = np.frombuffer(one, np.uint8, length) != np.frombuffer(other, np.uint8, length)
    return int(differ.argmax())


def cut_at_prefixes(blocks: Iterable[tuple[Rows, np.ndarray]], size: int) -> Iterator[Batch]:
    """The same rows, at most so many at a time.

    A batch is full, unless it can end where the next row shares much less with it: a replica that has nothing of that prefix
    then computes less anew. It is three quarters full in any case.

    Args:
        blocks: From `measure`.
        size: Most rows of a batch.
    """
    left, shared, place = Rows(), np.empty(0, np.int32), 0
    for rows, lengths in blocks:
        left, shared = left + rows, np.concatenate([shared, lengths])
        # Beyond a full batch there is a row, which tells what its end would cut apart.
        while len(left) > size:
            end = _end(shared, size)
            yield _batch(left.slice(0, end), place, shared)
            left, shared, place = left.slice(end), shared[end:], place + 1
    if len(left):
        yield _batch(left, place, shared)


def _batch(rows: Rows, place: int, shared: np.ndarray) -> Batch:
    return Batch(rows, place=place, shared=int(shared[0]) if shared[0] >= _LEAST_SHARED else 0)


def _end(shared: np.ndarray, size: int) -> int:
    """Number of rows of the batch that begins here."""
    first = max(1, math.ceil(size * _LEAST_FULL))
    ends = np.arange(first, size + 1)
    least = int(ends[shared[ends] == shared[ends].min()].max())
    saved = shared[size] - shared[least]
    return least if saved >= max(_LEAST_SHARED, shared[size] * _MUCH_LESS) else size
