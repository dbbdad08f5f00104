"""Tasks over workers that may die."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sere.calibration_jobs.workers.results import Result
from sere.calibration_jobs.workers.task import Task
from sere.conf.errors import ConfigError

# A worker that dies this often on the same task is not unlucky.
_MAX_ATTEMPTS = 4
_NOTE_AFTER_S = 60.0

_ADVICE = (
    "If they ran out of memory, lower batch_size, max_activation_bytes or num_workers, or set max_memory_gib; then run the "
    "same command again"
)

_log = logging.getLogger(__name__)


class WorkerPool:
    """Ray actors that pull tasks. A task whose worker dies goes to another one, and the worker is replaced. Of a task of
    several shards the other one does what came after the last checkpoint.

    Use as a context manager; the workers are gone afterwards.
    """

    def __init__(self, start: Callable[[], Any], num_workers: int) -> None:
        """No actor is started yet.

        Args:
            start: Starts one actor; it must have a method `ready`.
            num_workers: Actors to keep.
        """
        self._start = start
        self._num_workers = num_workers
        self._idle: list[Any] = []
        # A worker gets tasks once it is ready: one that finds no place in the cluster must not sit on a task.
        self._starting: dict[Any, Any] = {}
        self.num_replaced = 0
        self._num_failed_starts = 0

    def __enter__(self) -> "WorkerPool":
        for _ in range(self._num_workers):
            self._add()
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for worker in [*self._idle, *self._starting.values()]:
            ray.kill(worker)

    def _add(self) -> None:
        worker = self._start()
        self._starting[worker.ready.remote()] = worker

    def run(self, tasks: Sequence[Task], checkpoint: Callable[[Task], Result | None]) -> Iterator[tuple[Task, Result]]:
        """Results as they come, in any order; of a task of shards one after each of them.

        Args:
            tasks: What is to be done.
            checkpoint: The last one of a task of shards; None: there is none.

        Raises:
            ConfigError: what a worker raised as such, or that workers keep dying.
        """
        import ray

        waiting = deque(tasks)
        running: dict[Any, tuple[Any, Task]] = {}
        deaths: Counter[str] = Counter()
        num_done: Counter[str] = Counter()
        noted = time.monotonic()
        try:
            while waiting or running:
                while waiting and self._idle:
                    task = waiting.popleft()
                    call, num_done[task.name] = _call(self._idle[-1], task, checkpoint)
                    running[call] = self._idle.pop(), task
                done, _ = ray.wait([*self._starting, *running], num_returns=1, timeout=_NOTE_AFTER_S)
                if not done:
                    if not running and time.monotonic() - noted > _NOTE_AFTER_S:
                        noted = time.monotonic()
                        _log.warning("waiting for a worker: free in the cluster are %s", ray.available_resources())
                    continue
                if done[0] in self._starting:
                    self._welcome(done[0])
                    continue
                worker, task = running.pop(done[0])
                try:
                    result = ray.get(next(done[0]) if task.shards else done[0])
                except ray.exceptions.RayTaskError as error:
                    self._idle.append(worker)
                    raise _original(error) from None
                except ray.exceptions.RayError as error:
                    # The worker, its node, or the result on its node is gone.
                    place = task.shards[num_done[task.name]] if task.shards else task.name
                    deaths[place] += 1
                    ray.kill(worker)
                    if deaths[place] >= _MAX_ATTEMPTS:
                        raise ConfigError(
                            f"{deaths[place]} workers died on {place}, the last with: {_reason(error)}. {_ADVICE}"
                        ) from error
                    _log.warning("a worker died on %s, which is done again: %s", place, _reason(error))
                    waiting.appendleft(task)
                    self.num_replaced += 1
                    self._add()
                    continue
                num_done[task.name] = result[1]["num_shards"] if task.shards else 0
                if num_done[task.name] < len(task.shards):
                    # Behind the others: which of several that are ready comes first goes by their order.
                    running[done[0]] = worker, task
                else:
                    self._idle.append(worker)
                yield task, result
        finally:
            self._idle += [worker for worker, _ in running.values()]

    def _welcome(self, ready: Any) -> None:
        import ray

        worker = self._starting.pop(ready)
        try:
            ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            ray.kill(worker)
            raise _original(error) from None
        except ray.exceptions.RayError as error:
            # It died while it loaded the model, or its node did.
            ray.kill(worker)
            self.num_replaced += 1
            self._num_failed_starts += 1
            if self._num_failed_starts >= _MAX_ATTEMPTS * self._num_workers:
                raise ConfigError(
                    f"workers die while they load the model, the last with: {_reason(error)}. {_ADVICE}"
                ) from error
            self._add()
        else:
            self._num_failed_starts = 0
            self._idle.append(worker)


def _call(worker: Any, task: Task, checkpoint: Callable[[Task], Result | None]) -> tuple[Any, int]:
    """Have a worker begin a task, or go on with it: what stands for its results, and how many shards are done."""
    method = getattr(worker, task.method)
    begun = checkpoint(task) if task.shards else None
    if begun is None:
        return method.remote(*task.arguments), 0
    return method.remote(*task.arguments, begun=begun), begun[1]["num_shards"]


def _original(error: Any) -> Exception:
    """What the worker raised; running out of a GPU's memory becomes an error that says what to do."""
    if type(error.cause).__name__ == "OutOfMemoryError":
        return ConfigError(f"a worker ran out of GPU memory ({_reason(error.cause)}). {_ADVICE}")
    return error.cause if isinstance(error.cause, ConfigError) else error.as_instanceof_cause()


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if len(lines) < 2 else f"{lines[0]} {lines[-1]}") if lines else type(error).__name__
