"""`sere calibrate inspect`, `diff` and `promote`: what an artifact says, how two differ, and which one is the champion."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sere.calibration_jobs.judge.agreement import agreement
from sere.calibration_jobs.publish.numbers import best_metric, reference_errors, transfer_table
from sere.conf.errors import ConfigError
from sere.ops.similarity import SimilarityArtifact
from sere.pipeline.tracking import store as mlflow_store

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_DIFFERENT = "different"


def load(path_or_uri: str, *, uri: str | None) -> SimilarityArtifact:
    """An artifact given by path or `models:/NAME@ALIAS`."""
    with tempfile.TemporaryDirectory(prefix="sere-artifact-") as folder:
        return SimilarityArtifact.load(mlflow_store.resolve_artifact(path_or_uri, tracking_uri=uri, folder=Path(folder)))


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and len(value) > 8:
            found[f"{prefix}{key}"] = f"{value[0]} ... {value[-1]} ({len(value)})"
        else:
            found[f"{prefix}{key}"] = str(value)
    return found


def _manifest_of(artifact: SimilarityArtifact) -> dict[str, str]:
    return _flat({key: value for key, value in artifact.manifest.items() if key != "quality"})


def inspect(path_or_uri: str, *, uri: str | None, output: str | None, console: "Console") -> None:
    """Print an artifact's manifest and figures; with `output`, write its pictures to that folder."""
    artifact = load(path_or_uri, uri=uri)
    quality = artifact.manifest.get("quality") or {}
    table = _table(path_or_uri, "manifest", "")
    for key, value in _manifest_of(artifact).items():
        table.add_row(key, value)
    console.print(table)
    for made in quality_tables(quality):
        console.print(made)
    if not quality.get("held_out"):
        console.print("Not judged on held-out rows (judge.held_out_rows was 0, or the artifact is of an older version).")
    if output is not None:
        from sere.calibration_jobs.publish.figures import all_figures

        for path, figure in all_figures(artifact, quality):
            try:
                (Path(output) / path).parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(Path(output) / path, dpi=110)
            except OSError as error:
                raise ConfigError(f"cannot write pictures into {output} ({error.strerror}): choose another --output") from error
        console.print(f"Pictures are in {output}")


def quality_tables(quality: Mapping[str, Any]) -> list["Table"]:
    """The figures of a quality record as tables."""
    found = []
    if quality.get("reliability"):
        last = quality["reliability"][-1]
        table = _table(
            f"Reliability: two halves of {last['num_tokens']} tokens", "metric", "rank correlation", "same nearest expert"
        )
        for metric, figures in last["metrics"].items():
            table.add_row(metric, f"{figures['spearman']:.3f}", f"{figures['decision']:.3f}")
        found.append(table)
    for metric, figures in quality.get("transfer", {}).items():
        table = _table(f"Transfer, {metric}: rank correlation / same nearest expert", "domain", *figures["domains"])
        for domain, *values in zip(figures["domains"], figures["spearman"], figures["decision"], strict=True):
            table.add_row(domain, *(f"{a:.3f} / {b:.3f}" for a, b in zip(*values, strict=True)))
        found.append(table)
    sources, rows = transfer_table(dict(quality))
    if rows:
        table = _table("Held-out error by source of the matrices", "tokens of", *sources)
        for domain, errors in rows.items():
            table.add_row(domain, *(f"{errors[source]:.4f}" for source in sources))
        found.append(table)
    if quality.get("held_out"):
        found.append(_held_out_table(quality))
    if quality.get("emulation"):
        table = _table(
            "Teacher-forced decode emulation", "policy", "batch", "S", "active experts", "perplexity", "KL", "same next token"
        )
        for row in quality["emulation"]:
            table.add_row(
                row["policy"],
                str(row["batch_size"]),
                str(row["primary_top_k"] or "-"),
                f"{row['active_experts']:.1f}",
                f"{row['perplexity']:.4f}",
                f"{row['kl']:.5f}",
                f"{row['agreement']:.4f}",
            )
        found.append(table)
    return found


def _held_out_table(quality: Mapping[str, Any]) -> "Table":
    table = _table(
        "Held-out re-routing error (relative error of a layer's output, mean over layers)",
        "matrices", "batch", "S", "threshold", "error", "of random", "alignment", "critical", "active before", "after",
    )  # fmt: skip
    random = {(r["batch_size"], r["primary_top_k"]): r["error"] for r in quality["held_out"] if r["candidate"] == "random"}
    for row in quality["held_out"]:
        against = random.get((row["batch_size"], row["primary_top_k"]))
        table.add_row(
            row["candidate"],
            str(row["batch_size"]),
            str(row["primary_top_k"]),
            f"{row['threshold']:.3f}",
            f"{row['error']:.4f}",
            # Only where nothing is kept critical are the active experts the same.
            f"{row['error'] / against:.3f}" if against and row["threshold"] == 0 else "",
            f"{row['alignment']:.4f}",
            f"{row['critical_share']:.1%}",
            f"{row['active_before']:.1f}",
            f"{row['active_after']:.1f}",
        )
    best = best_metric(dict(quality))
    reference = quality["reference"]
    table.caption = f"lowest error at S={reference['primary_top_k']}, batch {reference['batch_size']}: {best}"
    return table


def diff(first: str, second: str, *, uri: str | None, console: "Console") -> None:
    """Print how two artifacts differ: provenance, matrices, decisions, quality.

    Raises:
        ConfigError: if they are of models with different layers or experts, or have no metric in common.
    """
    a, b = load(first, uri=uri), load(second, uri=uri)
    if a.layers != b.layers or a.num_experts != b.num_experts:
        raise ConfigError(
            f"{first} has {len(a.layers)} layers of {a.num_experts} experts, {second} {len(b.layers)} of {b.num_experts}: they "
            "are of different models and cannot be compared"
        )
    shared = [metric for metric in a.metrics if metric in b.metrics]
    if not shared:
        raise ConfigError(f"{first} ({', '.join(a.metrics)}) and {second} ({', '.join(b.metrics)}) have no metric in common")
    left, right = _manifest_of(a), _manifest_of(b)
    table = _table("Provenance", _DIFFERENT, "A", "B")
    for key in sorted({*left, *right}):
        if left.get(key) != right.get(key):
            table.add_row(key, left.get(key, "-"), right.get(key, "-"))
    console.print(table if table.row_count else "Provenance: the same")
    table = _table("Matrices and decisions", "metric", "largest difference", "mean", "rank correlation", "same nearest expert")
    figures = agreement(a.matrices, b.matrices, shared)
    for metric in shared:
        gaps = [(a.matrix(layer, metric) - b.matrix(layer, metric)).abs() for layer in a.layers]
        table.add_row(
            metric,
            f"{max(gap.max().item() for gap in gaps):.4f}",
            f"{sum(gap.mean().item() for gap in gaps) / len(gaps):.4f}",
            f"{figures[metric]['spearman']:.4f}",
            f"{figures[metric]['decision']:.4f}",
        )
    console.print(table)
    qualities = [artifact.manifest.get("quality") or {} for artifact in (a, b)]
    errors = [reference_errors(quality) for quality in qualities]
    names = [name for name in errors[0] if name in errors[1]]
    if names:
        same = qualities[0]["reference"] == qualities[1]["reference"] and left["data.digest"] == right["data.digest"]
        note = "" if same else ": not on the same held-out rows or setting, so not comparable"
        table = _table(f"Held-out error{note}", "matrices", "A", "B", "B - A")
        for name in names:
            table.add_row(name, f"{errors[0][name]:.4f}", f"{errors[1][name]:.4f}", f"{errors[1][name] - errors[0][name]:+.4f}")
        console.print(table)


def promote(version_uri: str, *, uri: str, console: "Console") -> None:
    """Make a version the champion of its registered model.

    Args:
        version_uri: `models:/NAME/VERSION` or `models:/NAME@ALIAS`.
        uri: MLflow tracking URI.
        console: Where to say what was done.

    Raises:
        ConfigError: if there is no such version.
    """
    name, version, before = mlflow_store.promote(version_uri, uri=uri)
    console.print(f"{name}: champion is version {version}, was {before or 'none'}", highlight=False)
