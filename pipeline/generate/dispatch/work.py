"""The nouns of this room: rows for a call, a replica as it is seen from here, and what became of one that died."""

import time
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa


@dataclass(frozen=True)
class Batch:
    """Rows for one call of a replica."""

    table: pa.Table
    num_tries: int = 0
    """Replicas that died with these rows."""
    alone: bool = False
    """A replica that has these rows has no others."""
    hopeless: bool = False
    """Not to be tried: earlier sessions have found these rows out."""


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
