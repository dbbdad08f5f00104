"""Runs a job's tasks over workers, and keeps every result on disk before anyone counts on it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from sere.calibration_jobs.workers.pool import WorkerPool
from sere.calibration_jobs.workers.results import Result, Results
from sere.calibration_jobs.workers.task import Task
from sere.calibration_jobs.workers.worker import CalibrationWorker
from sere.conf.schema import CalibrateConfig
from sere.pipeline.runtime.cluster import refuse_missing_room, start_ray


class TaskRunner:
    """Runs tasks that have no result yet, over workers that are started when the first is needed."""

    def __init__(self, config: CalibrateConfig, results: Results, *, block_tokens: int, ray_address: str | None) -> None:
        """Nothing is started yet.

        Args:
            config: The settings.
            results: Where results are kept.
            block_tokens: Tokens of a block.
            ray_address: The Ray cluster to join; None: a local one is started.
        """
        self._config, self._results, self._block_tokens, self._ray_address = config, results, block_tokens, ray_address
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
        config = self._config
        start_ray(config.num_workers * config.num_cpus_per_worker, address=self._ray_address)
        refuse_missing_room(
            {"CPU": config.num_cpus_per_worker, "GPU": config.num_gpus_per_worker},
            address=self._ray_address,
            what="a worker",
            remedy="num_{}_per_worker",
        )

    def share(self, value: Any) -> Any:
        """What stands for a large value as an argument of many tasks: it is sent to each machine once."""
        import ray

        self.start_ray()
        return ray.put(value)

    def _start_worker(self) -> Any:
        import ray

        options = {"num_cpus": self._config.num_cpus_per_worker, "num_gpus": self._config.num_gpus_per_worker}
        return ray.remote(**options)(CalibrationWorker).remote(self._config, self._block_tokens)

    def stored(self, name: str) -> Result | None:
        """A task's result that is on disk, or None."""
        return self._results.load(name)

    def run(self, tasks: Sequence[Task], description: str) -> Iterator[tuple[Task, Result]]:
        """Results, those of earlier runs first. Each is on disk before it is handed out.

        Of a group of shards also what the worker tells before the last of them: of that only checkpoints are on disk.
        """
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as progress:
            # Shards of groups, other tasks as a whole.
            bar = progress.add_task(description, total=sum(max(1, len(task.shards)) for task in tasks))
            num_done: Counter[str] = Counter()
            missing = []
            for task in tasks:
                result = self.stored(task.name)
                if result is None:
                    missing.append(task)
                    continue
                num_done[task.name] = max(1, len(task.shards))
                progress.update(bar, completed=num_done.total())
                if task.shards:
                    # Left where the command ended right after it had written the result.
                    self._results.remove(task.checkpoint)
                yield task, result
            if not missing:
                return
            if self._pool is None:
                self.start_ray()
                self._pool = WorkerPool(self._start_worker, self._config.num_workers).__enter__()
            for task, result in self._pool.run(missing, lambda task: self.stored(task.checkpoint)):
                num_done[task.name] = result[1]["num_shards"] if task.shards else 1
                # Fewer than before, where a worker died after its last checkpoint.
                progress.update(bar, completed=num_done.total())
                self._keep(task, result)
                yield task, result

    def _keep(self, task: Task, result: Result) -> None:
        """Write a result, or a checkpoint, before anyone counts on it."""
        tensors, info = result
        if task.shards and info["num_shards"] < len(task.shards):
            if tensors:
                self._results.save(task.checkpoint, result)
            return
        self._results.save(task.name, result)
        self.num_done += 1
        if task.shards:
            self._results.remove(task.checkpoint)
