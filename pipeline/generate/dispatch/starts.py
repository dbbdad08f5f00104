"""Replicas that are being started: those that wait for room, those that do not start, and when that is no accident."""

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from sere.conf.errors import ConfigError
from sere.pipeline.generate.dispatch.work import Handle, reason

_MAX_FAILED_STARTS = 3
_log = logging.getLogger(__name__)


class Starts:
    """The replicas that are not ready yet."""

    def __init__(self, start: Callable[[int], tuple[str, Any]], end: Callable[[Any], None]) -> None:
        """See `Dispatcher`."""
        self._start, self._end = start, end
        self._starting: dict[Any, Handle] = {}
        self._placing: dict[Any, Handle] = {}
        self._refusals: dict[str, str] = {}
        self._num_started = self._failed = self._num_refused = 0

    def add(self) -> None:
        """Start one more."""
        name, actor = self._start(self._num_started)
        self._num_started += 1
        handle = Handle(name, actor, time.monotonic())
        self._placing[actor.node.remote()] = handle
        self._starting[actor.start.remote()] = handle

    @property
    def refs(self) -> list[Any]:
        """What to wait for; `welcome` takes each."""
        return [*self._starting, *self._placing]

    def unplaced(self, after_s: float) -> int:
        """Replicas that have been waiting for room in the cluster for so long (seconds)."""
        now = time.monotonic()
        return sum(now - handle.started > after_s for handle in self._placing.values())

    def welcome(self, ref: Any, *, is_any_ready: bool) -> Handle | None:
        """Take in what came of one of `refs`; the replica, if it is ready now.

        Args:
            ref: Of `refs`.
            is_any_ready: Whether there are others that work.

        Raises:
            ConfigError: if no replica can start: every one was refused, or those of two nodes, or they die again and again.
        """
        import ray

        if ref in self._placing:
            handle = self._placing.pop(ref)
            # Where this fails `start` does as well, and says why.
            with contextlib.suppress(ray.exceptions.RayError):
                handle.node = ray.get(ref)
            return None
        handle = self._starting.pop(ref)
        self._placing = {other: placing for other, placing in self._placing.items() if placing is not handle}
        try:
            handle.node = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            self._end(handle.actor)
            if isinstance(error.cause, ConfigError):
                self._refused(handle, error.cause, is_any_ready=is_any_ready)
            else:
                self._failed_to_start(handle, reason(error), is_any_ready=is_any_ready)
        except ray.exceptions.RayError as error:
            self._end(handle.actor)
            self._failed_to_start(handle, reason(error), is_any_ready=is_any_ready)
        else:
            self._failed = 0
            # Where one starts others may: on another node, for example.
            for _ in range(self._num_refused):
                self.add()
            self._num_refused = 0
            return handle
        return None

    def _refused(self, handle: Handle, why: ConfigError, *, is_any_ready: bool) -> None:
        """An engine said what is wrong. On one node that may be the node: two of them agree, or nobody else is left to ask."""
        self._refusals[handle.node] = str(why)
        if is_any_ready:
            self._failed_to_start(handle, str(why), is_any_ready=True)
            return
        if len(self._refusals) > 1 or not self._starting:
            raise why
        _log.warning("replica %s on %s did not start, others may: %s", handle.name, handle.node, why)
        self._num_refused += 1

    def _failed_to_start(self, handle: Handle, why: str, *, is_any_ready: bool) -> None:
        self._failed += 1
        if self._failed > _MAX_FAILED_STARTS:
            if not is_any_ready and not self._starting:
                raise ConfigError(f"replicas die while they start, the last with: {why}. See its log in the run directory")
            _log.warning("replica %s did not start, and is given up: %s", handle.name, why)
            return
        _log.warning("replica %s did not start, and is started again: %s", handle.name, why)
        self.add()

    def end_all(self) -> None:
        """End what is not ready yet."""
        for handle in self._starting.values():
            self._end(handle.actor)
        self._starting, self._placing = {}, {}
