"""The nouns of the judging, and which of them a job has: matrices and policies that are compared, and their settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sere.calibration_jobs.judge.agreement import off_diagonal
from sere.calibration_jobs.metrics.base import Matrices
from sere.conf.schema import METRICS, JudgeConfig, Metric, PolicyName, RerouteConfig
from sere.ops.policies.targets import random_similarity

RANDOM = "random"
"""The control: re-routing to a random primary expert."""
CHAMPION = "champion"
"""The matrices that the registry's champion has."""
UNMODIFIED = "none"
"""The model without re-routing."""


@dataclass(frozen=True)
class Candidate:
    """A set of matrices whose held-out error is measured. `candidates_of` and `transfer_candidates` fill it in."""

    name: str
    """Of a metric, `RANDOM`, `CHAMPION`, or of a metric and a domain, as `cosine@code`. Candidates of one name are draws of
    the same control: their figures are averaged."""
    matrices: Mapping[int, Tensor]
    """float32 `[num_experts, num_experts]` by layer."""
    thresholds: tuple[float, ...]


@dataclass(frozen=True)
class Setting:
    """One configuration whose held-out error is measured. `settings_of` fills it in."""

    candidate: str
    primary_top_k: int
    threshold: float
    batch_size: int


@dataclass(frozen=True)
class Emulated:
    """One policy whose decoding is emulated. `policies_of` fills it in."""

    name: str
    """`UNMODIFIED`, or a policy's name; of policy sere with its metric: `sere cosine`."""
    reroute: RerouteConfig
    tables: Mapping[int, Mapping[str, Tensor]] | None = None
    """What is known of the experts, by layer and name of the metric or table."""


def settings_of(candidates: Sequence[Candidate], *, primary_top_k: Sequence[int], batch_sizes: Sequence[int]) -> list[Setting]:
    """All combinations, in the order in which `routing_error` returns them; draws of one control have equal settings."""
    return [
        Setting(candidate.name, top_k, threshold, batch)
        for batch in batch_sizes
        for candidate in candidates
        for top_k in primary_top_k
        for threshold in candidate.thresholds
    ]


def thresholds_of(matrices: Matrices, metric: str, quantiles: Sequence[float]) -> tuple[float, ...]:
    """0, which re-routes always, and quantiles of a metric's off-diagonal similarities over all layers."""
    values = torch.cat([off_diagonal(matrix) for (_, name), matrix in sorted(matrices.items()) if name == metric])
    return (0.0, *(float(torch.quantile(values[:: max(1, len(values) >> 22)], q)) for q in quantiles))


def _layers(matrices: Matrices, metric: str) -> dict[int, Tensor]:
    return {layer: matrix for (layer, name), matrix in matrices.items() if name == metric}


def _random(config: JudgeConfig, like: Mapping[int, Tensor]) -> list[Candidate]:
    return [
        Candidate(
            RANDOM,
            {layer: random_similarity(config.seed + draw, layer, len(matrix)) for layer, matrix in like.items()},
            (0.0,),
        )
        for draw in range(config.num_random)
    ]


def candidates_of(config: JudgeConfig, matrices: Matrices, champion: Mapping[int, Tensor] | None) -> list[Candidate]:
    """Every metric with its thresholds, random primary experts, and the champion's matrices if there is one."""
    metrics = list(dict.fromkeys(name for _, name in matrices))
    found = [
        Candidate(metric, _layers(matrices, metric), thresholds_of(matrices, metric, config.threshold_quantiles))
        for metric in metrics
    ]
    found += _random(config, found[0].matrices)
    if champion is not None:
        found.append(Candidate(CHAMPION, champion, (0.0,)))
    return found


def transfer_candidates(config: JudgeConfig, matrices: Matrices, by_domain: Mapping[str, Matrices]) -> list[Candidate]:
    """The reference metric's matrices from all domains and from each one, and random primary experts."""
    found = [Candidate(config.metric, _layers(matrices, config.metric), (0.0,))]
    for domain, own in by_domain.items():
        found.append(Candidate(f"{config.metric}@{domain}", _layers(own, config.metric), (0.0,)))
    return found + _random(config, found[0].matrices)


def policies_of(
    config: JudgeConfig, tables: Mapping[int, Mapping[str, Tensor]], primary_top_k: Sequence[int]
) -> list[Emulated]:
    """What is emulated: the unmodified model, and for each S the policies of `config.policies`, sere with every metric.

    Policies whose tables were not calibrated are left out.
    """
    known = set.intersection(*(set(names) for names in tables.values()))
    found = [Emulated(UNMODIFIED, RerouteConfig(policy="none"))]
    for top_k in primary_top_k:
        dials: dict[str, Any] = {"primary_top_k": top_k, "threshold": 0.0, "seed": config.seed, "min_tokens": 1}
        for name in config.policies:
            metrics = [metric for metric in METRICS if metric in known] if name == "sere" else [config.metric]
            for metric in metrics:
                reroute = RerouteConfig(
                    policy=cast(PolicyName, name), similarity="in memory", metric=cast(Metric, metric), **dials
                )
                if known.issuperset(reroute.needs_tables):
                    found.append(Emulated(f"sere {metric}" if name == "sere" else name, reroute, tables))
    return found
