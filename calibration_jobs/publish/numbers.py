"""Picks numbers out of a job's quality record (`quality.json`), for MLflow and for tables."""

import math
from typing import TYPE_CHECKING, Any

from sere.calibration_jobs.judge.agreement import nearest, off_diagonal
from sere.calibration_jobs.judge.candidates import CHAMPION, RANDOM

if TYPE_CHECKING:
    from sere.ops.similarity import SimilarityArtifact


def reference_errors(quality: dict[str, Any]) -> dict[str, float]:
    """Held-out error at the reference setting by candidate: every metric, `random`, and `champion` if there is one."""
    return {row["candidate"]: row["error"] for row in _reference_rows(quality)}


def _reference_rows(quality: dict[str, Any]) -> list[dict[str, Any]]:
    reference = quality.get("reference")
    if reference is None:
        return []
    wanted = ("primary_top_k", "batch_size", "threshold")
    return [row for row in quality["held_out"] if all(row[key] == reference[key] for key in wanted)]


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in values.items() if math.isfinite(value)}


def layer_metrics(artifact: "SimilarityArtifact", quality: dict[str, Any], layer: int) -> dict[str, float]:
    """One layer's figures."""
    values: dict[str, float] = {}
    for metric in artifact.metrics:
        matrix = artifact.matrix(layer, metric)
        off = off_diagonal(matrix)
        values |= {
            f"{metric}/off_diagonal_mean": off.mean().item(),
            f"{metric}/off_diagonal_min": off.min().item(),
            f"{metric}/off_diagonal_max": off.max().item(),
            f"{metric}/distinct_nearest": float(len(nearest(matrix).unique())),
        }
    if quality.get("reliability"):
        for metric, found in quality["reliability"][-1]["metrics"].items():
            values[f"layer_reliability/{metric}_spearman"], values[f"layer_reliability/{metric}_decision"] = _of(found, layer)
    for row in _reference_rows(quality):
        values[f"layer_held_out_error/{row['candidate']}"] = _of(row, layer)
    return _finite(values)


def _of(record: dict[str, Any], layer: int) -> Any:
    # JSON has no integer keys.
    return record["layers"].get(layer, record["layers"].get(str(layer)))


def overall_metrics(quality: dict[str, Any]) -> dict[str, float]:
    """Figures over all layers."""
    values = {f"held_out_error/{name}": error for name, error in reference_errors(quality).items()}
    for row in quality.get("held_out", ()):
        key = f"S{row['primary_top_k']}_B{row['batch_size']}_rho{row['threshold']:.3f}/{row['candidate']}"
        values[f"error_{key}"] = row["error"]
        values[f"alignment_{key}"] = row["alignment"]
        values[f"critical_{key}"] = row["critical_share"]
    for row in quality.get("emulation", ()):
        key = f"{row['policy'].replace(' ', '_')}_B{row['batch_size']}"
        key += f"_S{row['primary_top_k']}" if row["primary_top_k"] else ""
        for figure in ("perplexity", "kl", "agreement", "active_experts", "charged_experts"):
            if figure in row:
                values[f"emulation_{figure}/{key}"] = row[figure]
    for metric, found in quality.get("transfer", {}).items():
        for place, first in enumerate(found["domains"]):
            for other, second in enumerate(found["domains"][:place]):
                for figure in ("spearman", "decision"):
                    values[f"transfer/{metric}_{figure}/{second}-{first}"] = found[figure][place][other]
    return _finite(values)


def transfer_table(quality: dict[str, Any]) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Held-out error by the domain of the tokens and by the matrices' source.

    Returns:
        Names of the sources (all domains, each domain, random), and errors by domain and source.
    """
    rows = {
        domain: {row["candidate"]: row["error"] for row in found}
        for domain, found in quality.get("transfer_error", {}).items()
        if found
    }
    return list(next(iter(rows.values()), {})), rows


def best_metric(quality: dict[str, Any]) -> str | None:
    """The metric with the lowest held-out error at the reference setting."""
    errors = {name: error for name, error in reference_errors(quality).items() if name not in (RANDOM, CHAMPION)}
    return min(errors, key=errors.__getitem__) if errors else None
