"""The nouns of this room: rows that lie elsewhere, a replica as it is seen from here, and what became of one that died."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa


@dataclass(frozen=True)
class Rows:
    """Rows in Ray's object store, somewhere in the cluster. Only whoever asks for them by `read` gets them."""

    pieces: tuple[tuple[Any, int, int], ...] = ()
    """Reference of a table, first row, and number of rows (above 0)."""

    def __len__(self) -> int:
        return sum(length for _, _, length in self.pieces)

    def slice(self, start: int, length: int | None = None) -> "Rows":
        """Some of them, in the same order."""
        end = len(self) if length is None else start + length
        found, position = [], 0
        for block, offset, size in self.pieces:
            first, last = max(start - position, 0), min(end - position, size)
            if first < last:
                found.append((block, offset + first, last - first))
            position += size
        return Rows(tuple(found))

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(self.pieces + other.pieces)

    def arguments(self) -> tuple[list[tuple[int, int]], list[Any]]:
        """For a call of an actor: where the rows are in the tables, and the tables, which Ray brings to it."""
        return [(offset, length) for _, offset, length in self.pieces], [block for block, _, _ in self.pieces]


def joined(spans: Iterable[tuple[int, int]], tables: Iterable[pa.Table]) -> pa.Table:
    """The rows of `Rows.arguments`, where its references have become tables."""
    return pa.concat_tables([table.slice(*span) for span, table in zip(spans, tables, strict=True)])


def cut(blocks: Iterable[Rows], size: int) -> Iterator[Rows]:
    """The same rows, so many at a time."""
    left = Rows()
    for block in blocks:
        left += block
        while len(left) >= size:
            yield left.slice(0, size)
            left = left.slice(size)
    if len(left):
        yield left


@dataclass(frozen=True)
class Batch:
    """Rows for one call of a replica."""

    rows: Rows
    num_tries: int = 0
    """Replicas that died with these rows."""
    alone: bool = False
    """A replica that has these rows has no others."""
    hopeless: bool = False
    """Not to be tried: earlier sessions have found these rows out."""
    place: int | None = None
    """In the order of prompts, where rows are in that order and these have not been tried."""
    shared: int = 0
    """Bytes that its first prompt has in common with the last one of the batch before; 0 if that is next to nothing."""


@dataclass
class Handle:
    """A replica as the dispatcher sees it."""

    name: str
    actor: Any
    started: float
    """Monotonic time, as the next two."""
    node: str = ""
    status: Any = None
    heard: float = 0.0
    """When it last said anything."""
    progressed: float = 0.0
    """When it last had something new to say, or something new to do."""
    batches: dict[int, Batch] = field(default_factory=dict)
    """Not yet written, by number."""
    running: set[int] = field(default_factory=set)
    """Of those, not yet answered."""
    num_written: int = 0
    """Rows in its parts."""

    def note(self, status: Any) -> None:
        """Take in what it says of itself."""
        self.heard = time.monotonic()
        before = self.status
        if before is None or (before.num_rows, before.num_steps) != (status.num_rows, status.num_steps):
            self.progressed = self.heard
        self.status, self.num_written = status, status.num_written
        for number in status.written:
            self.batches.pop(number, None)
            self.running.discard(number)


@dataclass(frozen=True)
class Death:
    """What is known of the end of a replica."""

    why: str
    is_rows_fault: bool
    """Its rows may have killed it."""


def death_of(error: Exception) -> Death:
    """What an error of Ray's says of a replica that does not answer: a node that was taken away was not killed by a row."""
    import ray

    is_nodes = getattr(error, "preempted", False) or isinstance(error, ray.exceptions.NodeDiedError)
    return Death(reason(error), is_rows_fault=not (is_nodes or "node has died" in str(error)))


def reason(error: Exception) -> str:
    """The line of an error of Ray's that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Ray goes on to explain what may kill workers in general.
    return lines[-1].split(" Some common causes")[0][:300] if lines else type(error).__name__
