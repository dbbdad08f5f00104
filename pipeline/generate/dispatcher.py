"""Gives batches of rows to replicas, and takes them back from replicas that die. Knows Ray actors, not what runs in them.

A batch belongs to a replica until all its rows are in parts. When a replica dies, its parts are read, and the rows that are
not in them are tried again. The last try is alone: one row at a time on a replica that does nothing else, so that a row that
kills its engine takes no other row with it.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from sere.conf.errors import ConfigError
from sere.pipeline.generate.parts import KEY

_log = logging.getLogger(__name__)
_POLL_S = 1.0
# Replicas that die so often without any row being finished in between will not do better.
_MAX_DEATHS_IN_VAIN = 8
_MAX_FAILED_STARTS = 3


@dataclass(frozen=True)
class Batch:
    """Rows for one call of a replica."""

    table: pa.Table
    num_tries: int = 0
    """Replicas that died with these rows."""
    alone: bool = False


@dataclass
class Handle:
    """A replica as the dispatcher sees it."""

    name: str
    actor: Any
    started: float
    node: str = ""
    status: Any = None
    batches: dict[int, Batch] = field(default_factory=dict)
    """Not yet written, by number."""
    running: set[int] = field(default_factory=set)
    """Of those, not yet answered."""


class Dispatcher:
    """Runs batches over replicas. `close` ends them."""

    def __init__(
        self,
        start: Callable[[int], tuple[str, Any]],
        end: Callable[[Any], None],
        *,
        num_replicas: int,
        concurrent_batches: int,
        max_retries: int,
        keys_written: Callable[[str], set[tuple[str, int]]],
        give_up: Callable[[pa.Table, str], None],
    ) -> None:
        """No replica is started yet.

        Args:
            start: Starts the replica with this number; returns its name and the actor.
            end: Ends an actor, dead or alive.
            num_replicas: Most replicas at a time. Those that find no room in the cluster wait, and nobody waits for them.
            concurrent_batches: Batches a replica works on at once.
            max_retries: Times a row is tried again.
            keys_written: The rows in the parts of the replica of this name, as (source_file, source_row).
            give_up: Takes rows that will not be tried again, and why.
        """
        self._start, self._end, self._num_replicas = start, end, num_replicas
        self._concurrent_batches, self._max_retries = concurrent_batches, max_retries
        self._keys_written, self._give_up = keys_written, give_up
        self.replicas: dict[Any, Handle] = {}
        """Ready ones, by actor."""
        self.gone: list[Handle] = []
        """Those that died or were stopped, with their last status."""
        self._starting: dict[Any, Handle] = {}
        self._calls: dict[Any, tuple[Handle, int]] = {}
        self._polls: dict[Any, Handle] = {}
        self._again: deque[Batch] = deque()
        self._num_started = self._num_batches = self._failed_starts = self._deaths_in_vain = 0
        self.num_replaced = 0
        self.first_ready: float | None = None
        """Monotonic time, as the next."""
        self.finished: float | None = None
        """When everything was answered and written."""

    @property
    def num_starting(self) -> int:
        return len(self._starting)

    def _add(self) -> None:
        name, actor = self._start(self._num_started)
        self._num_started += 1
        handle = Handle(name, actor, time.monotonic())
        self._starting[actor.start.remote()] = handle

    def run(self, batches: Iterable[pa.Table]) -> Iterator[None]:
        """Work until all batches are answered and written. Yields about once a second, for whoever watches.

        Raises:
            ConfigError: if replicas cannot start, or keep dying.
        """
        with _ReadAhead(batches, size=self._num_replicas * self._concurrent_batches) as ahead:
            for _ in range(self._num_replicas):
                self._add()
            polled = time.monotonic()
            while True:
                ahead.check()
                self._hand_out(ahead)
                if ahead.is_finished and not self._again and not any(handle.running for handle in self.replicas.values()):
                    unwritten = [handle for handle in self.replicas.values() if handle.batches]
                    if not unwritten:
                        self.finished = time.monotonic()
                        break
                    self._poll(unwritten, "flush")
                self._wait()
                if time.monotonic() - polled > _POLL_S:
                    polled = time.monotonic()
                    self._poll(list(self.replicas.values()), "status")
                    yield

    def _hand_out(self, ahead: "_ReadAhead") -> None:
        while True:
            alone = bool(self._again) and self._again[0].alone
            if alone:
                # What a replica has answered is written before it is given a row that may kill it.
                self._poll([h for h in self.replicas.values() if h.batches and not h.running], "flush")
            free = [handle for handle in self.replicas.values() if self._can_take(handle, alone=alone)]
            if not free:
                return
            batch = self._again.popleft() if self._again else ahead.take()
            if batch is None:
                return
            handle = min(free, key=lambda handle: len(handle.running))
            number = self._num_batches
            self._num_batches += 1
            handle.batches[number] = batch
            handle.running.add(number)
            self._calls[handle.actor.generate.remote(number, batch.table)] = handle, number

    def _can_take(self, handle: Handle, *, alone: bool) -> bool:
        if alone:
            return not handle.batches
        return len(handle.running) < self._concurrent_batches and not any(handle.batches[n].alone for n in handle.running)

    def _wait(self) -> None:
        import ray

        refs = [*self._calls, *self._starting, *self._polls]
        if not refs:
            time.sleep(0.05)
            return
        done, _ = ray.wait(refs, num_returns=1, timeout=0.5)
        if done:
            # And what else is there.
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for ref in done:
            if ref in self._starting:
                self._welcome(ref)
            elif ref in self._polls:
                self._note(self._polls.pop(ref), ref)
            elif ref in self._calls:
                handle, number = self._calls.pop(ref)
                if self._note(handle, ref):
                    self._deaths_in_vain = 0
                    handle.running.discard(number)

    def _welcome(self, ref: Any) -> None:
        import ray

        handle = self._starting.pop(ref)
        try:
            handle.node = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            self._end(handle.actor)
            cause = error.cause if isinstance(error.cause, Exception) else error
            self._start_failed(handle, str(cause), cause if isinstance(cause, ConfigError) else None)
        except ray.exceptions.RayError as error:
            self._end(handle.actor)
            self._start_failed(handle, reason(error), None)
        else:
            self.replicas[handle.actor] = handle
            self._failed_starts = 0
            if self.first_ready is None:
                self.first_ready = time.monotonic()

    def _start_failed(self, handle: Handle, why: str, final: ConfigError | None) -> None:
        self._failed_starts += 1
        if final is not None and self.first_ready is None:
            # The first engine that could not start: nor would another.
            raise final
        if self._failed_starts > _MAX_FAILED_STARTS:
            if not self.replicas and not self._starting:
                raise final or ConfigError(
                    f"replicas die while they start, the last with: {why}. See its log in the run directory"
                )
            _log.warning("replica %s did not start, and is given up: %s", handle.name, why)
            return
        _log.warning("replica %s did not start, and is started again: %s", handle.name, why)
        self._add()

    def _poll(self, handles: list[Handle], method: str) -> None:
        waiting = {id(handle) for handle in self._polls.values()}
        for handle in handles:
            if id(handle) not in waiting:
                self._polls[getattr(handle.actor, method).remote()] = handle

    def _note(self, handle: Handle, ref: Any) -> bool:
        """Take in what a replica says; False if it is dead."""
        import ray

        try:
            handle.status = ray.get(ref)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(error, ray.exceptions.RayTaskError) and "EngineDead" not in f"{type(cause).__name__} {error}":
                # Not an engine that died: storage that fails, or what this program does not expect.
                raise ConfigError(
                    f"replica {handle.name} failed: {reason(error)}. See its log in the run directory; the same command goes "
                    "on with what is finished"
                ) from error
            self._bury(handle, reason(error))
            return False
        for number in handle.status.written:
            handle.batches.pop(number, None)
            handle.running.discard(number)
        return True

    def _bury(self, handle: Handle, why: str) -> None:
        """Take back the rows of a dead replica and start another one."""
        if self.replicas.pop(handle.actor, None) is None:
            return
        self._end(handle.actor)
        self.gone.append(handle)
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] is not handle}
        self._polls = {ref: polled for ref, polled in self._polls.items() if polled is not handle}
        written = self._keys_written(handle.name)
        num_left = 0
        for number, batch in handle.batches.items():
            keys = zip(*(batch.table[column].to_pylist() for column in KEY), strict=True)
            left = batch.table.filter(pa.array([key not in written for key in keys], pa.bool_()))
            num_left += len(left)
            # A batch that was answered, and only not written, did not kill anything.
            self._try_again(left, batch.num_tries + (number in handle.running), why)
        _log.warning("replica %s on %s died (%s); %d of its rows are tried again", handle.name, handle.node, why, num_left)
        handle.batches, handle.running = {}, set()
        self._deaths_in_vain += 1
        if self._deaths_in_vain > max(_MAX_DEATHS_IN_VAIN, self._num_replicas):
            raise ConfigError(
                f"{self._deaths_in_vain} replicas died one after the other without finishing a row, the last with: {why}. See "
                "their logs in the run directory; the same command goes on with what is finished"
            )
        self.num_replaced += 1
        self._add()

    def _try_again(self, table: pa.Table, num_tries: int, why: str) -> None:
        if not len(table):
            return
        if num_tries > self._max_retries:
            self._give_up(table, f"the replica died {num_tries} times with this row, the last time with: {why}")
        elif num_tries == self._max_retries:
            self._again.extend(Batch(table.slice(row, 1), num_tries, alone=True) for row in range(len(table)))
        else:
            self._again.append(Batch(table, num_tries))

    def close(self, *, timeout_s: float) -> None:
        """Let replicas write what they have finished, within a time, and end them all."""
        import ray

        stops = {handle.actor.stop.remote(): handle for handle in self.replicas.values()}
        done, _ = ray.wait(list(stops), num_returns=len(stops), timeout=timeout_s) if stops else ([], [])
        for ref in done:
            try:
                stops[ref].status = ray.get(ref)
            except ray.exceptions.RayError as error:
                _log.warning("replica %s did not stop in order: %s", stops[ref].name, reason(error))
        self.gone += list(self.replicas.values())
        for handle in [*self.replicas.values(), *self._starting.values()]:
            self._end(handle.actor)
        self.replicas, self._starting = {}, {}


class _ReadAhead:
    """Reads batches in a thread, so that a slow input does not keep replicas waiting that have finished something."""

    _END = object()

    def __init__(self, batches: Iterable[pa.Table], *, size: int) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=size)
        self._batches = batches
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._error: BaseException | None = None
        self.is_finished = False
        """Every batch was taken."""

    def __enter__(self) -> "_ReadAhead":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def _read(self) -> None:
        try:
            for table in self._batches:
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
        if self.is_finished:
            return None
        try:
            item = self._queue.get(timeout=0.05)
        except queue.Empty:
            return None
        if item is self._END:
            self.is_finished = True
            return None
        return Batch(item)

    def check(self) -> None:
        """Raise what reading raised, at once: engines may take minutes to start."""
        if self._error is not None:
            raise self._error


def reason(error: Exception) -> str:
    """The line of an error of Ray's that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Ray goes on to explain what may kill workers in general.
    return lines[-1].split(" Some common causes")[0][:300] if lines else type(error).__name__
