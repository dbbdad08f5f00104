"""Reads batches in a thread, so that a slow input does not keep replicas waiting that have finished something."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa

from sere.pipeline.generate.dispatch.work import Batch


class ReadAhead:
    """Use as a context manager: it reads while it is open."""

    _END = object()

    def __init__(self, tables: Iterable[pa.Table], split: Callable[[pa.Table], list[Batch]], *, size: int) -> None:
        """Nothing is read yet.

        Args:
            tables: Rows, some at a time.
            split: Makes batches of them.
            size: Most tables that wait.
        """
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=size)
        self._tables, self._split = tables, split
        self._ready: deque[Batch] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._error: BaseException | None = None
        self._is_read = False

    def __enter__(self) -> "ReadAhead":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    @property
    def is_finished(self) -> bool:
        """Every batch was taken."""
        return self._is_read and not self._ready

    def _read(self) -> None:
        try:
            for table in self._tables:
                self._put(table)
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
        if not self._ready and not self._is_read:
            try:
                item = self._queue.get(timeout=0.05)
            except queue.Empty:
                return None
            if item is self._END:
                self._is_read = True
            else:
                self._ready.extend(self._split(item))
        return self._ready.popleft() if self._ready else None

    def check(self) -> None:
        """Raise what reading raised, at once: engines may take minutes to start."""
        if self._error is not None:
            raise self._error
