"""`sere artifact diff`: how two artifacts differ."""

from typing import TYPE_CHECKING

from sere.calibration_jobs.judge.agreement import agreement
from sere.calibration_jobs.publish.numbers import reference_errors
from sere.calibration_jobs.publish.tables import add_row, manifest_rows, new_table, refuse_damaged, table_differences
from sere.conf.errors import ConfigError
from sere.pipeline.tracking.artifacts import load_artifact

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sere.ops.similarity import SimilarityArtifact


def diff(first: str, second: str, *, uri: str | None, console: "Console") -> None:
    """Print how two artifacts differ: provenance, matrices, decisions, tables, quality.

    Raises:
        ConfigError: if they are of models with different layers or experts, have no metric in common, or are damaged.
    """
    a, b = load_artifact(first, uri=uri), load_artifact(second, uri=uri)
    if a.layers != b.layers or a.num_experts != b.num_experts:
        raise ConfigError(
            f"{first} has {len(a.layers)} layers of {a.num_experts} experts, {second} {len(b.layers)} of {b.num_experts}: they "
            "are of different models and cannot be compared"
        )
    shared = [metric for metric in a.metrics if metric in b.metrics]
    if not shared:
        raise ConfigError(f"{first} ({', '.join(a.metrics)}) and {second} ({', '.join(b.metrics)}) have no metric in common")
    with refuse_damaged(f"{first} or {second}"):
        found = _differences(a, b, shared)
    for one in found:
        console.print(one)


def _differences(a: "SimilarityArtifact", b: "SimilarityArtifact", shared: list[str]) -> list["Table | str"]:
    found: list[Table | str] = []
    left, right = manifest_rows(a), manifest_rows(b)
    table = new_table("Provenance", "different", "A", "B")
    for key in sorted({*left, *right}):
        if left.get(key) != right.get(key):
            add_row(table, key, left.get(key, "-"), right.get(key, "-"))
    found.append(table if table.row_count else "Provenance: the same")
    table = new_table(
        "Matrices and decisions", "metric", "largest difference", "mean", "rank correlation", "same nearest expert"
    )
    figures = agreement(a.matrices, b.matrices, shared)
    for metric in shared:
        gaps = [(a.matrix(layer, metric) - b.matrix(layer, metric)).abs() for layer in a.layers]
        add_row(
            table,
            metric,
            f"{max(gap.max().item() for gap in gaps):.4f}",
            f"{sum(gap.mean().item() for gap in gaps) / len(gaps):.4f}",
            f"{figures[metric]['spearman']:.4f}",
            f"{figures[metric]['decision']:.4f}",
        )
    found.append(table)
    if a.table_names or b.table_names:
        table = table_differences(a, b)
        found.append(table if table.row_count else "Tables: the same")
    qualities = [artifact.manifest.get("quality") or {} for artifact in (a, b)]
    errors = [reference_errors(quality) for quality in qualities]
    names = [name for name in errors[0] if name in errors[1]]
    if names:
        same = qualities[0]["reference"] == qualities[1]["reference"] and left.get("data.digest") == right.get("data.digest")
        note = "" if same else ": not on the same held-out rows or setting, so not comparable"
        table = new_table(f"Held-out error{note}", "matrices", "A", "B", "B - A")
        for name in names:
            add_row(
                table, name, f"{errors[0][name]:.4f}", f"{errors[1][name]:.4f}", f"{errors[1][name] - errors[0][name]:+.4f}"
            )
        found.append(table)
    return found
