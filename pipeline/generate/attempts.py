"""Which rows replicas are at work on, noted before their engines see them.

A row may kill its replica, which the driver sees, or the machine, which nobody sees: then this tells the next driver.
"""

import re
import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sere.pipeline.generate.parts import KEY
from sere.pipeline.runtime.storage import Storage

ATTEMPTS = "attempts"
ATTEMPT_NAMES = r"s\d+-[0-9a-f]+-r\d+\.json"


class Tried(NamedTuple):
    """What is known of a row that was being answered when a session ended."""

    num_tries: int = 0
    """Sessions and replicas that died with it."""
    num_alone: int = 0
    """Rows that a replica had to itself then, this one among them; 0: it had others."""


Tries = dict[str, dict[int, Tried]]
"""By file and row."""


class Attempts:
    """What one replica has in hand; one small file, written anew for every batch."""

    def __init__(self, storage: Storage, replica: str) -> None:
        """Nothing is written yet.

        Args:
            storage: The job's folder.
            replica: Its name.
        """
        self._storage, self._name = storage, f"{ATTEMPTS}/{replica}.json"
        self._batches: dict[int, dict[str, Any]] = {}
        self._noted: set[int] = set()
        # Batches begin in several threads: one of them writes for all that wait.
        self._lock = threading.Lock()

    def begin(self, number: int, table: pa.Table, num_tries: int, *, alone: bool) -> None:
        """Note a batch; to be called before its rows are tried."""
        files: dict[str, list[list[int]]] = {}
        names, rows = (table[column].to_pylist() for column in KEY)
        for name in dict.fromkeys(names):
            files[name] = _ranges(row for file, row in zip(names, rows, strict=True) if file == name)
        self._batches[number] = {"tries": num_tries, "alone": len(table) if alone else 0, "files": files}
        with self._lock:
            if number not in self._noted:
                batches = dict(self._batches)
                self._storage.put_json(self._name, list(batches.values()))
                self._noted = set(batches)

    def end(self, number: int) -> None:
        """A batch is answered; the next `begin` writes that down."""
        self._batches.pop(number, None)

    def forget(self) -> None:
        """Nothing was left in hand."""
        self._storage.remove(self._name)


def _ranges(rows: Iterable[int]) -> list[list[int]]:
    """Numbers as ranges, first and last."""
    ordered = np.array(sorted(rows))
    cuts = np.flatnonzero(np.diff(ordered) != 1) + 1
    return [[int(some[0]), int(some[-1])] for some in np.split(ordered, cuts)]


def read_attempts(storage: Storage, finished: Mapping[str, np.ndarray]) -> Tries:
    """What replicas of earlier sessions had in hand when they ended, however they ended; one try more than they were given.

    Args:
        storage: The job's folder.
        finished: Per file the rows that were written after all, sorted: those are none of them.
    """
    tries: Tries = {}
    for name in _notes(storage):
        noted = storage.get_json(name)
        for batch in noted if isinstance(noted, list) else ():
            for file, ranges in batch["files"].items():
                known = tries.setdefault(file, {})
                tried = Tried(batch["tries"] + 1, batch["alone"])
                for first, last in ranges:
                    known.update((row, max(known.get(row, Tried()), tried)) for row in range(first, last + 1))
    for file, known in tries.items():
        for row in np.intersect1d(finished.get(file, np.array([], np.int64)), list(known)).tolist():
            del known[row]
    return {file: known for file, known in tries.items() if known}


def forget_attempts(storage: Storage) -> None:
    """Remove all notes: the job is finished. What has another name is somebody else's."""
    storage.remove_all(_notes(storage))


def _notes(storage: Storage) -> list[str]:
    return [name for name in storage.sizes(ATTEMPTS) if re.fullmatch(ATTEMPT_NAMES, name.removeprefix(f"{ATTEMPTS}/"))]
