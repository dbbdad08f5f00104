"""Which tasks it takes to judge on held-out rows."""

from collections.abc import Sequence
from typing import Any

from sere.calibration_jobs.shards import TokenRow
from sere.calibration_jobs.workers.task import Task


def held_out_tasks(
    prefix: str, rows: Sequence[TokenRow], candidates: Any, batch_sizes: Sequence[int], primary_top_k: Sequence[int]
) -> list[Task]:
    """One task for every part of the rows that fills the largest decode batch; what is left over fills smaller ones.

    Args:
        prefix: Of the tasks' names: tells judgements apart.
        rows: The held-out rows.
        candidates: Ray reference of a list of `Candidate`.
        batch_sizes: Decode batches.
        primary_top_k: Values of S.
    """
    size = max(batch_sizes)
    return [
        Task(
            f"{prefix}-{start // size:04d}",
            "held_out",
            (tuple(rows[start : start + size]), candidates, batch_sizes, primary_top_k),
        )
        for start in range(0, len(rows), size)
        if len(rows[start : start + size]) >= min(batch_sizes)
    ]


def emulation_tasks(prefix: str, rows: Sequence[TokenRow], policies: Any, batch_sizes: Sequence[int]) -> list[Task]:
    """One task for every full decode batch of every size.

    Args:
        prefix: Of the tasks' names.
        rows: The held-out rows; those of one token predict nothing and are left out.
        policies: Ray reference of a list of `Emulated`.
        batch_sizes: Decode batches.
    """
    usable = [row for row in rows if len(row.tokens) > 1]
    return [
        Task(
            f"{prefix}-{size:04d}-{number:04d}",
            "emulate",
            (tuple(usable[number * size : (number + 1) * size]), policies),
            batch_size=size,
        )
        for size in batch_sizes
        for number in range(len(usable) // size)
    ]
