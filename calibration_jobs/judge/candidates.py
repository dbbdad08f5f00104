"""Judges matrices on held-out rows: which tasks that takes, and what their sums say."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from sere.calibration_jobs.judge import emulation, held_out
from sere.calibration_jobs.judge.agreement import off_diagonal
from sere.calibration_jobs.judge.emulation import Emulated
from sere.calibration_jobs.judge.held_out import Candidate, Setting, settings_of
from sere.calibration_jobs.metrics.merge import Matrices
from sere.calibration_jobs.shards import TokenRow
from sere.calibration_jobs.workers.pool import Task
from sere.calibration_jobs.workers.results import Result
from sere.conf.schema import JudgeConfig, RerouteConfig
from sere.ops.policies.base import random_similarity

RANDOM = "random"


def thresholds_of(matrices: Matrices, metric: str, quantiles: Sequence[float]) -> tuple[float, ...]:
    """0, which re-routes always, and quantiles of a metric's off-diagonal similarities over all layers."""
    values = torch.cat([off_diagonal(matrix) for (_, name), matrix in sorted(matrices.items()) if name == metric])
    return (0.0, *(float(torch.quantile(values[:: max(1, len(values) >> 22)], q)) for q in quantiles))


def _layers(matrices: Matrices, metric: str) -> dict[int, Tensor]:
    return {layer: matrix for (layer, name), matrix in matrices.items() if name == metric}


def _random(config: JudgeConfig, like: Mapping[int, Tensor]) -> list[Candidate]:
    return [
        Candidate(
            f"{RANDOM}-{number}",
            {layer: random_similarity(config.seed + number, layer, len(matrix)) for layer, matrix in like.items()},
            (0.0,),
        )
        for number in range(config.num_random)
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
        found.append(Candidate("champion", champion, (0.0,)))
    return found


def transfer_candidates(config: JudgeConfig, matrices: Matrices, by_domain: Mapping[str, Matrices]) -> list[Candidate]:
    """The reference metric's matrices from all domains and from each one, and random primary experts."""
    found = [Candidate(config.metric, _layers(matrices, config.metric), (0.0,))]
    for domain, own in by_domain.items():
        found.append(Candidate(f"{config.metric}@{domain}", _layers(own, config.metric), (0.0,)))
    return found + _random(config, found[0].matrices)


def policies_of(config: JudgeConfig, matrices: Matrices, primary_top_k: Sequence[int]) -> list[Emulated]:
    """What is emulated: the unmodified model, and for each S every metric, a random primary expert, and plain top-S."""
    found = [Emulated("none", RerouteConfig(policy="none"))]
    for top_k in primary_top_k:
        settings: dict[str, Any] = {"primary_top_k": top_k, "threshold": 0.0, "seed": config.seed}
        for metric in dict.fromkeys(name for _, name in matrices):
            reroute = RerouteConfig(policy="sere", similarity="in memory", metric=metric, **settings)
            found.append(Emulated(f"sere {metric}", reroute, _layers(matrices, metric)))
        found += [Emulated(name, RerouteConfig(policy=name, **settings)) for name in (RANDOM, "top_k")]
    return found


def held_out_tasks(
    prefix: str, rows: Sequence[TokenRow], candidates: Any, batch_sizes: Sequence[int], primary_top_k: Sequence[int]
) -> list[Task]:
    """One task for every part of the rows that fills the largest decode batch; what is left over fills smaller ones."""
    size = max(batch_sizes)
    return [
        Task(
            f"{prefix}-{start // size:04d}",
            "held_out",
            (tuple(rows[start : start + size]), candidates, batch_sizes, primary_top_k),
        )
        for start in range(0, len(rows), size)
        if len(rows[start : start + size]) >= min(batch_sizes)
    ]


def emulation_tasks(rows: Sequence[TokenRow], policies: Any, batch_sizes: Sequence[int]) -> list[Task]:
    """One task for every full decode batch of every size."""
    usable = [row for row in rows if len(row.tokens) > 1]
    return [
        Task(f"emulation-{size:04d}-{number:04d}", "emulate", (tuple(usable[number * size : (number + 1) * size]), policies))
        for size in batch_sizes
        for number in range(len(usable) // size)
    ]


def _figures(sums: Tensor) -> dict[str, float]:
    """One layer's or all layers' figures of one setting, from its sums `[len(held_out.SUMS)]`."""
    value = dict(zip(held_out.SUMS, sums.tolist(), strict=True))
    return {
        "error": math.sqrt(value["squared_error"] / value["squared_output"]) if value["squared_output"] else math.nan,
        "alignment": value["aligned"] / value["tokens"] if value["tokens"] else math.nan,
        "critical_share": value["critical"] / value["secondary"] if value["secondary"] else 0.0,
        "active_before": value["active_before"] / value["steps"] if value["steps"] else math.nan,
        "active_after": value["active_after"] / value["steps"] if value["steps"] else math.nan,
    }


def held_out_rows(
    results: Sequence[Result], candidates: Sequence[Candidate], batch_sizes: Sequence[int], primary_top_k: Sequence[int]
) -> list[dict[str, Any]]:
    """One row per setting: its fields, figures averaged over layers, and the error by layer; random ones are averaged."""
    settings = settings_of(candidates, primary_top_k=primary_top_k, batch_sizes=batch_sizes)
    layers = sorted(int(layer) for layer in results[0][0])
    totals = {layer: sum(tensors[str(layer)] for tensors, _ in results) for layer in layers}
    merged: dict[Setting, list[list[dict[str, float]]]] = {}
    for index, setting in enumerate(settings):
        name = RANDOM if setting.candidate.startswith(f"{RANDOM}-") else setting.candidate
        key = Setting(name, setting.primary_top_k, setting.threshold, setting.batch_size)
        merged.setdefault(key, []).append([_figures(totals[layer][index]) for layer in layers])
    rows = []
    for setting, repeats in merged.items():
        mean = [{key: _mean(repeat[place][key] for repeat in repeats) for key in repeats[0][0]} for place in range(len(layers))]
        figures = {key: _mean(layer[key] for layer in mean) for key in mean[0]}
        by_layer = {layer: values["error"] for layer, values in zip(layers, mean, strict=True)}
        rows.append({**asdict(setting), **figures, "layers": by_layer})
    return rows


def emulation_rows(results: Mapping[str, Result], policies: Sequence[Emulated]) -> list[dict[str, Any]]:
    """One row per policy and decode batch: perplexity, KL divergence (nats a token), next-token agreement, active experts."""
    by_size: dict[int, Tensor] = {}
    for name, (tensors, _) in results.items():
        size = int(name.split("-")[1])
        by_size[size] = by_size.get(size, 0) + tensors["sums"]
    rows = []
    for size, totals in sorted(by_size.items()):
        for emulated, line in zip(policies, totals, strict=True):
            value = dict(zip(emulation.SUMS, line.tolist(), strict=True))
            rows.append(
                {
                    "policy": emulated.name,
                    "primary_top_k": emulated.reroute.primary_top_k if emulated.name != "none" else None,
                    "batch_size": size,
                    "perplexity": math.exp(value["nll"] / value["tokens"]),
                    "kl": value["kl"] / value["tokens"],
                    "agreement": value["agreement"] / value["tokens"],
                    "active_experts": value["active_experts"] / value["layer_steps"],
                    "num_tokens": int(value["tokens"]),
                }
            )
    return rows


def find_row(rows: Sequence[Mapping[str, Any]], **wanted: Any) -> Mapping[str, Any] | None:
    """The first row with these values."""
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


def _mean(values: Any) -> float:
    values = list(values)
    return math.fsum(values) / len(values)
