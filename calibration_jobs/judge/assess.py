"""Judges the matrices of a job: how reliable they are, whether they transfer, and what held-out rows say."""

from collections.abc import Sequence
from typing import Any

from sere.calibration_jobs.facts import JobFacts, Similarities
from sere.calibration_jobs.judge.agreement import transfer
from sere.calibration_jobs.judge.candidates import Candidate, candidates_of, policies_of, transfer_candidates
from sere.calibration_jobs.judge.champion import Champion, read_champion
from sere.calibration_jobs.judge.rows import emulation_rows, held_out_rows
from sere.calibration_jobs.judge.tasks import emulation_tasks, held_out_tasks
from sere.calibration_jobs.metrics.base import Matrices
from sere.calibration_jobs.shards import TokenRow
from sere.calibration_jobs.workers.results import Result
from sere.calibration_jobs.workers.runner import TaskRunner
from sere.calibration_jobs.workers.task import Task
from sere.conf.nested import digest_of


def assess(job: JobFacts, tasks: TaskRunner, found: Similarities) -> dict[str, Any]:
    """All figures: reliability, transfer, and what held-out rows say. The champion is judged beside, on the same rows."""
    quality: dict[str, Any] = {"reliability": found.growth}
    by_domain = _by_domain(job, found)
    if by_domain:
        metrics = [metric for metric in job.config.metrics if metric != "weights"]
        quality["transfer"] = {metric: transfer(list(by_domain.items()), metric) for metric in metrics}
    champion = read_champion(job)
    if champion is not None:
        quality["champion_version"] = champion.version
    settings = job.config.judge
    top_ks = [s for s in settings.primary_top_k if job.model.top_k is None or s < job.model.top_k]
    if not job.plan.held_out or not top_ks:
        return quality
    judge = _HeldOutJudge(job, tasks, found, top_ks, champion)
    quality |= {"held_out": judge.errors(), "reference": judge.reference}
    if by_domain and settings.metric != "weights":
        quality["transfer_error"] = judge.transfer_errors(by_domain)
    if settings.emulate_batch_sizes:
        quality["emulation"] = judge.emulation()
    return quality


def _by_domain(job: JobFacts, found: Similarities) -> dict[str, Matrices]:
    """Each domain's matrices; empty where there is but one."""
    domains = job.plan.domains
    if found.merged is None or len(domains) < 2:
        return {}
    return {domain: found.merged.matrices(domain=number) for number, domain in enumerate(domains)}


class _HeldOutJudge:
    """Runs tasks on the held-out rows and reads their figures."""

    def __init__(
        self, job: JobFacts, tasks: TaskRunner, found: Similarities, top_ks: list[int], champion: Champion | None
    ) -> None:
        self._job, self._tasks, self._matrices, self._top_ks, self._champion = job, tasks, found.matrices, top_ks, champion
        self._tables = found.by_layer()
        self._settings = job.config.judge
        # Another champion's results are others.
        versus = {"key": job.key, "champion": champion.version} if champion is not None else None
        self._key = digest_of(versus)[:12] if versus else job.key
        asked = self._settings.reference_primary_top_k
        self.reference: dict[str, Any] = {
            "metric": self._settings.metric,
            "primary_top_k": asked if asked in top_ks else max(top_ks),
            "batch_size": self._settings.reference_batch_size,
            "threshold": 0.0,
        }
        tasks.start_ray()

    def _run(self, tasks: list[Task], description: str) -> list[tuple[Task, Result]]:
        """Tasks with their results in the order of the tasks, so that sums of them are the same each time."""
        found = {task.name: result for task, result in self._tasks.run(tasks, description)}
        return [(task, found[task.name]) for task in tasks]

    def _error_rows(
        self,
        name: str,
        rows: Sequence[TokenRow],
        candidates: list[Candidate],
        batch_sizes: Sequence[int],
        primary_top_k: Sequence[int],
    ) -> list[dict[str, Any]]:
        import ray

        tasks = held_out_tasks(f"{self._key}-{name}", rows, ray.put(candidates), batch_sizes, primary_top_k)
        results = [result for _, result in self._run(tasks, f"Judging ({name.replace('_', ' ')})")]
        return held_out_rows(results, candidates, batch_sizes, primary_top_k) if results else []

    def errors(self) -> list[dict[str, Any]]:
        """Held-out error of every candidate at every setting."""
        candidates = candidates_of(self._settings, self._matrices, self._champion.matrices if self._champion else None)
        return self._error_rows("held_out", self._job.plan.held_out, candidates, self._settings.batch_sizes, self._top_ks)

    def transfer_errors(self, by_domain: dict[str, Matrices]) -> dict[str, list[dict[str, Any]]]:
        """By domain of the held-out rows: the error of every domain's matrices on them, at the reference setting."""
        candidates = transfer_candidates(self._settings, self._matrices, by_domain)
        return {
            domain: self._error_rows(
                f"transfer_{number}",
                [row for row in self._job.plan.held_out if row.domain == domain],
                candidates,
                [self.reference["batch_size"]],
                [self.reference["primary_top_k"]],
            )
            for number, domain in enumerate(by_domain)
        }

    def emulation(self) -> list[dict[str, Any]]:
        """Figures of the whole model under every policy, at every decode batch."""
        import ray

        policies = policies_of(self._settings, self._tables, self._top_ks)
        sizes = self._settings.emulate_batch_sizes
        tasks = emulation_tasks(f"{self._key}-emulation", self._job.plan.held_out, ray.put(policies), sizes)
        return emulation_rows(self._run(tasks, "Judging (emulation)"), policies)
