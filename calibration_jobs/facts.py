"""The job's nouns: what a calibration is of, and what its text has said. `job.py` fills both in."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sere.calibration_jobs.metrics.base import Matrices
from sere.calibration_jobs.metrics.merge import MergedSums, Tables
from sere.calibration_jobs.shards import Group, Plan
from sere.calibration_jobs.workers.model import MoeFacts
from sere.calibration_jobs.workers.room import ResultSizes
from sere.conf.schema import CalibrateConfig
from sere.pipeline.runtime.job_folder import JobFolder


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """What is known of a job before it begins."""

    config: CalibrateConfig
    model: MoeFacts
    plan: Plan
    groups: tuple[Group, ...]
    """Of the plan's shards."""
    sizes: ResultSizes
    folder: JobFolder
    """Open: this process works in it."""
    name: str
    """The registered model."""
    key: str
    """What one MLflow run and one version belong to; keeps the results of other judge settings apart."""
    run_id: str | None
    """The MLflow run; None without tracking."""

    @property
    def file(self) -> Path:
        """The artifact."""
        return Path(self.config.output)


def tables_of(config: CalibrateConfig, folder: JobFolder) -> tuple[str, ...]:
    """The tables that a job makes: those that are asked for, unless it was begun when there were none."""
    return tuple(folder.kept.get("tables", config.tables))


@dataclass(frozen=True)
class Similarities:
    """What the text, and the weights, say of the experts."""

    matrices: Matrices
    merged: MergedSums | None = None
    """The sums they come from, by domain and half; None where only weights are compared."""
    growth: list[dict[str, Any]] = field(default_factory=list)
    """How the agreement of the data's two halves grew with tokens: `num_tokens`, and `metrics` as `agreement` returns them."""

    tables: Tables = field(default_factory=dict)
    """What else is known of the experts, by layer and name."""
    explained: list[float] = field(default_factory=list)
    """Share of the outputs' variance that surrogates of rank 0, 1, ... explain."""

    def by_layer(self) -> dict[int, dict[str, Tensor]]:
        """Similarities and tables of each layer, by name."""
        found: dict[int, dict[str, Tensor]] = {}
        for (layer, name), tensor in {**self.matrices, **self.tables}.items():
            found.setdefault(layer, {})[name] = tensor
        return found

    @property
    def num_tokens(self) -> int:
        return self.merged.num_tokens() if self.merged is not None else 0
