"""What is tried again of the rows of a replica that died: all together, then by halves, until a row is known to be to blame."""

from itertools import groupby

import pyarrow as pa

from sere.pipeline.generate.attempts import Tried, Tries
from sere.pipeline.generate.dispatch.work import Batch, Rows
from sere.pipeline.generate.parts import KEY


def next_tries(batch: Batch, left: Rows, *, was_running: bool, max_retries: int) -> tuple[list[Batch], Rows | None]:
    """How the rows of a batch are tried again whose replica died.

    `max_retries` times they are tried as before, as most deaths are no row's fault. Then they are on their own on a replica,
    each time half as many as before; a single row that dies so is given up.

    Args:
        batch: As it was given to the replica.
        left: Its rows that are not written.
        was_running: It was not answered, and so may be to blame.
        max_retries: Times it is tried as before.

    Returns:
        Batches to try, and rows to give up.
    """
    if not len(left):
        return [], None
    num_tries = batch.num_tries + was_running
    if num_tries < max_retries or not was_running:
        return [Batch(left, num_tries, alone=batch.alone)], None
    if max_retries == 0 or (batch.alone and len(left) == 1):
        return [], left
    if not batch.alone:
        return [Batch(left, num_tries, alone=True)], None
    half = len(left) // 2
    return [Batch(left.slice(0, half), num_tries, alone=True), Batch(left.slice(half), num_tries, alone=True)], None


def split_by_tries(rows: Rows, keys: pa.Table, tries: Tries, *, max_retries: int) -> list[Batch]:
    """A batch as it is read: rows that earlier sessions died with apart, and on their own after as many as in `next_tries`.

    Args:
        rows: As they are read.
        keys: Their `source_file` and `source_row`.
        tries: Of earlier sessions.
        max_retries: As in `next_tries`.
    """
    places = zip(*(keys[column].to_pylist() for column in KEY), strict=True)
    found = [tries.get(file, {}).get(row, Tried()) for file, row in places]
    batches, start = [], 0
    for tried, same in groupby(found):
        length = len(list(same))
        alone = tried.num_tries >= max(1, max_retries)
        # All together, then by halves of what they were.
        size = max(1, tried.num_alone // 2) if alone and tried.num_alone else length
        hopeless = alone and tried.num_alone == 1
        some = rows.slice(start, length)
        groups = [some.slice(first, size) for first in range(0, length, size)]
        batches += [Batch(group, tried.num_tries, alone=alone, hopeless=hopeless) for group in groups]
        start += length
    return batches
