"""Reads batches in a thread, so that a slow input does not keep replicas waiting that have finished something."""

import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any

from sere.pipeline.generate.dispatch.work import Batch, Rows

_END_S = 5.0


class ReadAhead:
    """Use as a context manager: it reads while it is open."""

    _END = object()

    def __init__(self, rows: Iterable[Rows], split: Callable[[Rows], list[Batch]], *, size: int) -> None:
        """Nothing is read yet.

        Args:
            rows: Some at a time.
            split: Makes batches of them.
            size: Most of them that wait.
        """
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=size)
        self._rows, self._split = rows, split
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._error: BaseException | None = None
        self.is_finished = False
        """Every batch was taken."""

    def __enter__(self) -> "ReadAhead":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        # Whoever ends Ray next must not meet a thread that would start it again.
        self._thread.join(timeout=_END_S)

    def _read(self) -> None:
        try:
            for rows in self._rows:
                for batch in self._split(rows):
                    self._put(batch)
                if self._stop.is_set():
                    return
            self._put(self._END)
        except BaseException as error:
            self._error = error

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.5)
                return
            except queue.Full:
                continue

    def take(self) -> Batch | None:
        """The next batch, if one is read within a moment: a replica has room for it."""
        if self.is_finished:
            return None
        try:
            item = self._queue.get(timeout=0.05)
        except queue.Empty:
            return None
        if item is self._END:
            self.is_finished = True
            return None
        return item

    def check(self) -> None:
        """Raise what reading raised, at once: engines may take minutes to start."""
        if self._error is not None:
            raise self._error
