"""Runs a job's tasks over workers, and keeps every result on disk before anyone counts on it."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from sere.calibration_jobs.workers.model import ModelFacts
from sere.calibration_jobs.workers.pool import Task, WorkerPool, check_room, start_ray
from sere.calibration_jobs.workers.results import DamagedResult, JobFolder, Result
from sere.conf.schema import CalibrateConfig

_log = logging.getLogger(__name__)


class TaskRunner:
    """Runs tasks whose results are not yet in the folder, over workers that are started when the first is needed."""

    def __init__(self, config: CalibrateConfig, model: ModelFacts, folder: JobFolder) -> None:
        self._config, self._model, self._folder = config, model, folder
        self._pool: WorkerPool | None = None
        self.num_done = 0

    def __enter__(self) -> "TaskRunner":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.__exit__(*exception)

    @property
    def num_replaced(self) -> int:
        """Workers that died and were replaced."""
        return self._pool.num_replaced if self._pool is not None else 0

    def start_ray(self) -> None:
        """Join or start Ray, and see that it has room for a worker."""
        start_ray(self._config.num_workers * self._config.num_cpus_per_worker)
        check_room(num_cpus=self._config.num_cpus_per_worker, num_gpus=self._config.num_gpus_per_worker)

    def _start_worker(self) -> Any:
        import ray

        from sere.calibration_jobs.workers.worker import CalibrationWorker

        options = {"num_cpus": self._config.num_cpus_per_worker, "num_gpus": self._config.num_gpus_per_worker}
        return ray.remote(**options)(CalibrationWorker).remote(self._config, self._model.block_tokens)

    def stored(self, name: str) -> Result | None:
        """A task's result from an earlier run, or None; a damaged one is named and computed again."""
        if not self._folder.has(name):
            return None
        try:
            return self._folder.load(name)
        except DamagedResult as error:
            _log.warning("%s: it is computed again", error)
            self._folder.discard(name)
            return None

    def run(self, tasks: Sequence[Task], description: str) -> Iterator[tuple[Task, Result]]:
        """Results, those of earlier runs first. Each is on disk before it is handed out."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as progress:
            bar = progress.add_task(description, total=len(tasks))
            missing = []
            for task in tasks:
                result = self.stored(task.name)
                if result is None:
                    missing.append(task)
                    continue
                progress.advance(bar)
                yield task, result
            if not missing:
                return
            if self._pool is None:
                self.start_ray()
                self._pool = WorkerPool(self._start_worker, self._config.num_workers).__enter__()
            for task, result in self._pool.run(missing):
                self._folder.save(task.name, result)
                self.num_done += 1
                progress.advance(bar)
                yield task, result
