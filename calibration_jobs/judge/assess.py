"""Judges the matrices of a job: how reliable they are, whether they transfer, and what held-out rows say."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sere.calibration_jobs.judge.candidates import (
    candidates_of,
    emulation_rows,
    emulation_tasks,
    held_out_rows,
    held_out_tasks,
    policies_of,
    transfer_candidates,
)
from sere.calibration_jobs.publish.record import champion_matrices
from sere.calibration_jobs.shards import Plan
from sere.calibration_jobs.workers.model import ModelFacts
from sere.calibration_jobs.workers.pool import Task
from sere.calibration_jobs.workers.results import Result, digest_of
from sere.calibration_jobs.workers.tasks import TaskRunner
from sere.conf.schema import CalibrateConfig

if TYPE_CHECKING:
    from sere.calibration_jobs.judge.held_out import Candidate
    from sere.calibration_jobs.metrics.merge import MergedSums


def assess(
    config: CalibrateConfig,
    model: ModelFacts,
    tasks: TaskRunner,
    plan: Plan,
    merged: "MergedSums | None",
    matrices: dict,
    growth: list[dict[str, Any]],
    key: str,
    name: str,
    run_id: str | None,
) -> dict[str, Any]:
    """All figures: reliability, transfer, and what held-out rows say. The champion is judged beside, on the same rows."""
    from sere.calibration_jobs.judge.agreement import transfer

    quality: dict[str, Any] = {"reliability": growth}
    token_metrics = [metric for metric in config.metrics if metric != "weights"]
    if merged is not None and len(plan.domains) > 1:
        by_domain = [(domain, merged.matrices(domain=number)) for number, domain in enumerate(plan.domains)]
        quality["transfer"] = {metric: transfer(by_domain, metric) for metric in token_metrics}
    champion, champion_of = champion_matrices(config, model, name, run_id)
    if champion_of is not None:
        key = digest_of({"key": key, "champion": champion_of})[:12]
        quality["champion_version"] = champion_of
    return quality | _judge(config, model, tasks, plan, merged, matrices, champion, key)


def _judge(
    config: CalibrateConfig,
    model: ModelFacts,
    tasks: TaskRunner,
    plan: Plan,
    merged: "MergedSums",
    matrices: dict,
    champion: Any,
    key: str,
) -> dict[str, Any]:
    """Everything that held-out rows say. `key` keeps the results of other judge settings apart."""
    import ray

    settings = config.judge
    top_ks = [s for s in settings.primary_top_k if model.top_k is None or s < model.top_k]
    if not plan.held_out or not top_ks:
        return {}
    tasks.start_ray()

    def run(prefix: str, make: Callable[[], list[Task]], description: str) -> dict[str, Result]:
        return {task.name.removeprefix(prefix): result for task, result in tasks.run(make(), description)}

    def error_rows(name: str, rows: Any, candidates: "list[Candidate]", sizes: Sequence[int], values: Sequence[int]) -> list:
        prefix = f"{key}-{name}"
        found = run(
            prefix,
            lambda: held_out_tasks(prefix, rows, ray.put(candidates), sizes, values),
            f"Judging ({name.replace('_', ' ')})",
        )
        return held_out_rows(list(found.values()), candidates, sizes, values) if found else []

    candidates = candidates_of(settings, matrices, champion)
    quality: dict[str, Any] = {"held_out": error_rows("held_out", plan.held_out, candidates, settings.batch_sizes, top_ks)}
    reference = settings.reference_primary_top_k if settings.reference_primary_top_k in top_ks else max(top_ks)
    quality["reference"] = {
        "metric": settings.metric, "primary_top_k": reference, "batch_size": settings.reference_batch_size, "threshold": 0.0,
    }  # fmt: skip
    if len(plan.domains) > 1 and settings.metric != "weights":
        by_domain = {domain: merged.matrices(domain=number) for number, domain in enumerate(plan.domains)}
        across = transfer_candidates(settings, matrices, by_domain)
        quality["transfer_error"] = {
            domain: error_rows(
                f"transfer_{number}",
                [row for row in plan.held_out if row.domain == domain],
                across,
                [settings.reference_batch_size],
                [reference],
            )
            for number, domain in enumerate(plan.domains)
        }
    if settings.emulate_batch_sizes:
        policies = policies_of(settings, matrices, top_ks)
        prefix = f"{key}-"
        found = run(
            prefix,
            lambda: [
                dataclasses.replace(task, name=prefix + task.name)
                for task in emulation_tasks(plan.held_out, ray.put(policies), settings.emulate_batch_sizes)
            ],
            "Judging (emulation)",
        )
        quality["emulation"] = emulation_rows(found, policies)
    return quality
