"""What the sums of held-out tasks say: one row of figures for each setting or policy, as `quality.json` keeps it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from sere.calibration_jobs.judge import emulation, held_out_error
from sere.calibration_jobs.judge.candidates import Candidate, Emulated, Setting, settings_of
from sere.calibration_jobs.workers.results import Result
from sere.calibration_jobs.workers.task import LayerTensors, Task


def _figures(sums: Tensor) -> dict[str, float]:
    """One layer's figures of one setting, from its sums `[len(held_out_error.SUMS)]`."""
    value = dict(zip(held_out_error.SUMS, sums.tolist(), strict=True))
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
    """One row per setting: its fields, figures averaged over layers, the error by layer; draws of a control are averaged."""
    settings = settings_of(candidates, primary_top_k=primary_top_k, batch_sizes=batch_sizes)
    parts = [LayerTensors.from_result(result).by_layer for result in results]
    layers = sorted(parts[0])
    totals = {layer: reduce(torch.add, (part[layer] for part in parts)) for layer in layers}
    draws: dict[Setting, list[list[dict[str, float]]]] = {}
    for index, setting in enumerate(settings):
        draws.setdefault(setting, []).append([_figures(totals[layer][index]) for layer in layers])
    rows = []
    for setting, repeats in draws.items():
        mean = [{key: _mean(repeat[place][key] for repeat in repeats) for key in repeats[0][0]} for place in range(len(layers))]
        figures = {key: _mean(layer[key] for layer in mean) for key in mean[0]}
        by_layer = {layer: values["error"] for layer, values in zip(layers, mean, strict=True)}
        rows.append({**asdict(setting), **figures, "layers": by_layer})
    return rows


def emulation_rows(results: Iterable[tuple[Task, Result]], policies: Sequence[Emulated]) -> list[dict[str, Any]]:
    """One row per policy and decode batch: perplexity, KL divergence (nats a token), next-token agreement, active experts."""
    by_size: dict[int, Tensor] = {}
    for task, (tensors, _) in results:
        assert task.batch_size is not None
        by_size[task.batch_size] = by_size.get(task.batch_size, 0) + tensors["sums"]
    rows = []
    for size, totals in sorted(by_size.items()):
        for emulated, line in zip(policies, totals, strict=True):
            value = dict(zip(emulation.SUMS, line.tolist(), strict=True))
            rows.append(
                {
                    "policy": emulated.name,
                    "primary_top_k": emulated.reroute.primary_top_k if emulated.reroute.policy != "none" else None,
                    "batch_size": size,
                    "perplexity": math.exp(value["nll"] / value["tokens"]),
                    "kl": value["kl"] / value["tokens"],
                    "agreement": value["agreement"] / value["tokens"],
                    "active_experts": value["active_experts"] / value["layer_steps"],
                    "charged_experts": value["charged_experts"] / value["layer_steps"],
                    "num_tokens": int(value["tokens"]),
                }
            )
    return rows


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)
