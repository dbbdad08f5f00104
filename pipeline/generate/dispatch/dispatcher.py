"""Gives batches of rows to replicas, and takes them back from replicas that die. Knows Ray actors, not what runs in them.

A batch belongs to a replica until all its rows are in parts. When a replica dies, its parts are read, and the rows that are
not in them are tried again (`again`). Rows that must be alone have one replica at a time to themselves; the others go on.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from sere.conf.errors import ConfigError, TryAgainError
from sere.pipeline.generate.dispatch.affinity import Affinity
from sere.pipeline.generate.dispatch.again import next_tries
from sere.pipeline.generate.dispatch.read_ahead import ReadAhead
from sere.pipeline.generate.dispatch.starts import Starts
from sere.pipeline.generate.dispatch.work import Batch, Death, Handle, Rows, death_of, reason

_log = logging.getLogger(__name__)
_POLL_S = 1.0
# Batches per replica among which it finds those that go on with its prefixes; and of all replicas.
_LOOK_AHEAD, _MOST_LOOKED_AT = 32, 1000
# Replicas that die so often without any row being written in between will not do better.
_MAX_DEATHS_IN_VAIN = 8


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
        stall_timeout_s: float,
        left_of: Callable[[str, Sequence[Rows]], tuple[int, list[Rows]]],
        give_up: Callable[[Rows, str], None],
        split: Callable[[Batch], list[Batch]],
    ) -> None:
        """No replica is started yet.

        Args:
            start: Starts the replica with this number; returns its name and the actor.
            end: Ends an actor, dead or alive.
            num_replicas: Most replicas at a time. Those that find no room in the cluster wait, and nobody waits for them.
            concurrent_batches: Batches a replica works on at once.
            max_retries: Times a row is tried again as before.
            stall_timeout_s: Seconds without progress after which a replica that has work counts as dead.
            left_of: Of the dead replica of this name, and the batches it had: rows in its parts, and rows that are not.
            give_up: Takes rows that will not be tried again, and why.
            split: Makes batches of one as it is read, for rows that have been tried.
        """
        self._end, self._num_replicas = end, num_replicas
        self._concurrent_batches, self._max_retries = concurrent_batches, max_retries
        self._stall_timeout_s = stall_timeout_s
        self._left_of, self._give_up, self._split = left_of, give_up, split
        self.starts = Starts(start, end)
        self.replicas: dict[Any, Handle] = {}
        """Ready ones, by actor."""
        self.gone: list[Handle] = []
        """Those that died or were stopped, with their last status."""
        self._calls: dict[Any, tuple[Handle, int]] = {}
        self._polls: dict[Any, Handle] = {}
        self._again: deque[Batch] = deque()
        self._alone: deque[Batch] = deque()
        self._affinity = Affinity()
        self._num_batches = self._deaths_in_vain = self._num_written = self._num_given_up = 0
        self.num_replaced = 0
        self.first_ready: float | None = None
        """Monotonic time, as the next."""
        self.finished: float | None = None
        """When everything was answered and written."""

    def run(self, batches: Iterable[Batch]) -> Iterator[None]:
        """Work until all rows are answered and written. Yields about once a second, for whoever watches.

        Args:
            batches: As they are read.

        Raises:
            ConfigError: if replicas cannot start, or cannot write.
            TryAgainError: if they keep dying.
        """
        size = self._num_replicas * self._concurrent_batches
        size_in_order = max(size, min(self._num_replicas * _LOOK_AHEAD, _MOST_LOOKED_AT))
        with ReadAhead(batches, self._split, size=size, size_in_order=size_in_order) as ahead:
            for _ in range(self._num_replicas):
                self.starts.add()
            polled = time.monotonic()
            while True:
                ahead.check()
                self._hand_out(ahead)
                is_left = self._again or self._alone or any(handle.running for handle in self.replicas.values())
                if ahead.is_finished and not is_left:
                    unwritten = [handle for handle in self.replicas.values() if handle.batches]
                    if not unwritten:
                        self.finished = time.monotonic()
                        break
                    self._poll(unwritten, "flush")
                self._wait()
                if time.monotonic() - polled > _POLL_S:
                    polled = time.monotonic()
                    self._poll(list(self.replicas.values()), "status")
                    self._bury_stalled()
                    yield

    def _hand_out(self, ahead: ReadAhead) -> None:
        own = self._one_for_rows_alone()
        while True:
            free = [h for h in self.replicas.values() if h is not own and len(h.running) < self._concurrent_batches]
            if not free:
                return
            handle = min(free, key=lambda handle: len(handle.running))
            batch = self._again.popleft() if self._again else ahead.take(partial(self._affinity.choose, handle))
            if batch is None:
                return
            if batch.hopeless:
                why = f"sessions ended {batch.num_tries} times while this row was being answered, the last times on its own"
                self._give_up(batch.rows, why)
            elif batch.alone:
                self._alone.append(batch)
                return
            else:
                self._give(handle, batch)

    def _one_for_rows_alone(self) -> Handle | None:
        """The replica that has, or is about to have, rows that must be alone; None if there are no such rows."""
        holders = [h for h in self.replicas.values() if any(batch.alone for batch in h.batches.values())]
        own = holders[0] if holders else None
        if not self._alone:
            # One that waits for the next such row is free again as soon as there is none.
            return own if own is not None and own.running else None
        if own is None:
            own = min(self.replicas.values(), key=lambda handle: len(handle.running), default=None)
        if own is not None and not own.running:
            if own.batches:
                # What it has answered is written before it is given a row that may kill it.
                self._poll([own], "flush")
            else:
                self._give(own, self._alone.popleft())
        return own

    def _give(self, handle: Handle, batch: Batch) -> None:
        number = self._num_batches
        self._num_batches += 1
        if not handle.running:
            handle.progressed = time.monotonic()
        handle.batches[number] = batch
        handle.running.add(number)
        self._affinity.note(handle, batch)
        spans, blocks = batch.rows.arguments()
        self._calls[handle.actor.generate.remote(number, batch.num_tries, batch.alone, spans, *blocks)] = handle, number

    def _wait(self) -> None:
        import ray

        refs = [*self._calls, *self.starts.refs, *self._polls]
        if not refs:
            time.sleep(0.05)
            return
        done, _ = ray.wait(refs, num_returns=1, timeout=0.5)
        if done:
            # And what else is there.
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for ref in done:
            if ref in self.starts.refs:
                handle = self.starts.welcome(ref, is_any_ready=bool(self.replicas))
                if handle is not None:
                    self.replicas[handle.actor] = handle
                    self.first_ready = self.first_ready or time.monotonic()
            elif ref in self._polls:
                self._note(self._polls.pop(ref), ref)
            elif ref in self._calls:
                handle, number = self._calls.pop(ref)
                if self._note(handle, ref):
                    handle.running.discard(number)

    def _poll(self, handles: list[Handle], method: str) -> None:
        waiting = {id(handle) for handle in self._polls.values()}
        for handle in handles:
            if id(handle) not in waiting:
                self._polls[getattr(handle.actor, method).remote()] = handle

    def _note(self, handle: Handle, ref: Any) -> bool:
        """Take in what a replica says; False if it is dead."""
        import ray

        try:
            handle.note(ray.get(ref))
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            # A disk that is full or read-only is so for every replica; a storage that did not answer costs this one.
            if isinstance(cause, ConfigError) and not isinstance(cause, TryAgainError):
                raise cause from None
            self._bury(handle, Death(reason(error), is_rows_fault="EngineDead" in f"{type(cause).__name__} {error}"))
            return False
        except ray.exceptions.RayError as error:
            self._bury(handle, death_of(error))
            return False
        return True

    def _bury_stalled(self) -> None:
        """A stopped process, or a collective operation that hangs, says nothing, or nothing new, for ever."""
        for handle in list(self.replicas.values()):
            silent_s = time.monotonic() - handle.progressed
            if handle.running and silent_s > self._stall_timeout_s:
                self._bury(handle, Death(f"no progress for {silent_s:.0f} s (stall_timeout_s)", is_rows_fault=True))

    def _bury(self, handle: Handle, death: Death) -> None:
        """Take back the rows of a dead replica and start another one."""
        if self.replicas.pop(handle.actor, None) is None:
            return
        self._end(handle.actor)
        self.gone.append(handle)
        self._affinity.forget(handle)
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] is not handle}
        self._polls = {ref: polled for ref, polled in self._polls.items() if polled is not handle}
        numbers = list(handle.batches)
        handle.num_written, lefts = self._left_of(handle.name, [handle.batches[number].rows for number in numbers])
        for number, left in zip(numbers, lefts, strict=True):
            batch = handle.batches[number]
            # A batch that was answered, and only not written, did not kill anything.
            was_running = number in handle.running and death.is_rows_fault
            again, given_up = next_tries(batch, left, was_running=was_running, max_retries=self._max_retries)
            for one in again:
                (self._alone if one.alone else self._again).append(one)
            if given_up is not None:
                why = f"the replica died {batch.num_tries + 1} times with this row, the last time with: {death.why}"
                self._give_up(given_up, why)
                self._num_given_up += len(given_up)
        what = f"replica {handle.name} on {handle.node} died ({death.why})"
        _log.warning("%s; %d of its rows are tried again", what, sum(map(len, lefts)))
        handle.batches, handle.running = {}, set()
        self._count_death(death)
        self.num_replaced += 1
        self.starts.add()

    def _count_death(self, death: Death) -> None:
        total = sum(handle.num_written for handle in (*self.gone, *self.replicas.values())) + self._num_given_up
        self._deaths_in_vain = 1 if total > self._num_written else self._deaths_in_vain + 1
        self._num_written = total
        if self._deaths_in_vain > max(_MAX_DEATHS_IN_VAIN, self._num_replicas):
            raise TryAgainError(
                f"{self._deaths_in_vain} replicas died one after the other without finishing a row, the last with: "
                f"{death.why}. See their logs in the run directory; the same command goes on with what is finished"
            )

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
        for handle in self.replicas.values():
            self._end(handle.actor)
        self.starts.end_all()
        self.replicas = {}
