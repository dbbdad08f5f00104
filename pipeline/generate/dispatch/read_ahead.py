"""Reads batches in a thread, so that a slow input does not keep replicas waiting that have finished something."""

import threading
from collections.abc import Callable, Iterable, Sequence

from sere.pipeline.generate.dispatch.work import Batch

_END_S = 5.0
_MOMENT_S = 0.05


class ReadAhead:
    """Use as a context manager: it reads while it is open."""

    def __init__(
        self, batches: Iterable[Batch], split: Callable[[Batch], list[Batch]], *, size: int, size_in_order: int
    ) -> None:
        """Nothing is read yet.

        Args:
            batches: As they are read.
            split: Makes batches of one, for rows that have been tried.
            size: Most of them that wait.
            size_in_order: The same for batches in the order of their prompts: all of those are read before the first comes, and
                the more wait the more often a replica finds one that goes on with what it has.
        """
        self._batches, self._split = batches, split
        self._size, self._size_in_order = size, size_in_order
        self._waiting: list[Batch] = []
        self._changed = threading.Condition()
        self._is_read = self._is_stopped = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._error: BaseException | None = None

    @property
    def is_finished(self) -> bool:
        """Every batch was taken."""
        with self._changed:
            return self._is_read and not self._waiting

    def __enter__(self) -> "ReadAhead":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        # Whoever ends Ray next must not meet a thread that would start it again.
        self._thread.join(timeout=_END_S)

    def _read(self) -> None:
        try:
            for read in self._batches:
                for batch in self._split(read):
                    self._put(batch)
                if self._is_stopped:
                    return
            with self._changed:
                self._is_read = True
                self._changed.notify_all()
        except BaseException as error:
            self._error = error

    def _put(self, batch: Batch) -> None:
        size = self._size if batch.place is None else self._size_in_order
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < size or self._is_stopped)
            self._waiting.append(batch)
            self._changed.notify_all()

    def take(self, choose: Callable[[Sequence[Batch]], int]) -> Batch | None:
        """A batch, if one is read within a moment: a replica has room for it.

        Args:
            choose: Of those that wait, in the order of reading, the number of the one to take.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_read, timeout=_MOMENT_S)
            if not self._waiting:
                return None
            batch = self._waiting.pop(choose(self._waiting))
            self._changed.notify_all()
            return batch

    def check(self) -> None:
        """Raise what reading raised, at once: engines may take minutes to start."""
        if self._error is not None:
            raise self._error
