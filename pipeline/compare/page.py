"""The comparison as one HTML file that needs nothing else: charts are inline SVG, heatmaps are embedded, nothing is loaded."""

import base64
import dataclasses
import io
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from sere.conf.errors import ConfigError
from sere.conf.whole_file import written_whole
from sere.pipeline.compare import charts
from sere.pipeline.compare.heatmaps import heatmaps
from sere.pipeline.compare.pareto import Group
from sere.pipeline.compare.runs import Row, difference, similarity_of
from sere.pipeline.tracking.artifacts import load_artifact
from sere.pipeline.tracking.circumstances import CIRCUMSTANCES
from sere.pipeline.tracking.runs import read_history

_MAX_HEATMAPS = 4
_NAMES = {"none": "unmodified", "random": "random (control)", "top_k": "top_k (control)"}
# What differs between any two runs, and says nothing about them.
_UNTOLD = ("output", "tracking.", "reroute.stats_dir")


def write_report(
    file: Path,
    groups: list[Group],
    *,
    experiment: str,
    uri: str,
    max_loss: float,
    notes: list[str],
) -> list[str]:
    """Write the page.

    Args:
        file: Where to write it.
        groups: What to show.
        experiment: Name for the title.
        uri: MLflow tracking URI, for the figures of layers and over time, and the similarity artifact.
        max_loss: Quality loss allowed for the recommended configuration.
        notes: What could not be read.

    Returns:
        The notes, and what the page itself could not read.
    """
    import jinja2

    templates = resources.files("sere.pipeline.compare") / "templates"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((templates / "report.html.jinja").read_text(encoding="utf-8"))
    rows = [row for group in groups for row in group.rows]
    numbers = {row.run_id: number for number, row in enumerate(rows, start=1)}
    pictures, heading, note = _heatmaps(rows, uri)
    notes = [*notes, note] if note else notes
    page = template.render(
        css=(templates / "report.css").read_text(encoding="utf-8"),
        experiment=experiment,
        facts=_facts(rows),
        groups=[_group(group, numbers, uri, max_loss) for group in groups],
        policies=[(charts.symbol(policy), _NAMES.get(policy, policy)) for policy in dict.fromkeys(row.policy for row in rows)],
        max_loss=f"{max_loss:g}",
        heatmaps=pictures,
        heatmaps_of=heading,
        settings=_settings(rows),
        configurations=[(numbers[row.run_id], row.label) for row in rows],
        notes=notes,
    )
    with written_whole(file) as aside:
        aside.write_text(page, encoding="utf-8")
    return notes


def _facts(rows: list[Row]) -> list[tuple[str, str]]:
    """What was compared."""

    def of(key: str) -> str:
        return ", ".join(dict.fromkeys(dict(row.group).get(key) or "unknown" for row in rows))

    days = sorted({datetime.fromtimestamp(row.started_ms / 1000, UTC).strftime("%Y-%m-%d") for row in rows})
    counts = dict.fromkeys(f"{row.metrics['num_rows']:.0f}" for row in rows if "num_rows" in row.metrics)
    commits = dict.fromkeys(row.commit[:10] + row.commit[40:] for row in rows)
    return [
        ("Model", of("model")),
        ("Data", of("data")),
        ("Rows", ", ".join(counts) or "unknown"),
        ("Decode batch", of("engine.max_num_seqs")),
        ("Runs", f"{len(rows)}, {days[0]} to {days[-1]}" if len(days) > 1 else f"{len(rows)}, {days[0]}"),
        ("Device", of("device")),
        ("Versions", "; ".join(f"{key.partition('.')[2]} {of(key)}" for key in CIRCUMSTANCES if "." in key)),
        ("Commit", ", ".join(commits)),
    ]


def _group(group: Group, numbers: dict[str, int], uri: str, max_loss: float) -> dict[str, Any]:
    rows = group.rows
    baseline = next((row for row in rows if row.is_baseline), None)
    losses = [row.loss for row in rows if row.loss is not None]
    ends = [end for loss in losses for end in (loss.point, loss.low, loss.high) if end is not None]
    span = (min([0, *ends]), max([max_loss, *ends]))
    return {
        "name": group.name,
        "recommendation": group.recommendation,
        "rows": [_cells(row, numbers[row.run_id], baseline, span, max_loss) for row in rows],
        "with_intervals": any(loss.low is not None for loss in losses),
        "charts": _scatters(rows, numbers),
        **_tasks(rows, numbers, baseline),
        "layers": _panels(rows, numbers, uri, ("layer/active_experts_before", "layer/active_experts_after"), "layer"),
        "series": _panels(rows, numbers, uri, ("progress/tokens_per_s",), "seconds"),
    }


def _cells(row: Row, number: int, baseline: Row | None, span: tuple[float, float], max_loss: float) -> dict[str, Any]:
    """A row of the table of configurations, as text."""

    def value(metric: str, form: str) -> str:
        return f"{row.metrics[metric]:{form}}" if metric in row.metrics else "–"

    def change(metric: str) -> str:
        gap, before = difference(row, baseline, metric), baseline.metrics.get(metric) if baseline is not None else None
        return f"{gap / before:+.0%}" if gap is not None and before else ""

    loss = row.loss if not row.is_baseline else None
    return {
        "row": row,
        "number": number,
        "symbol": charts.symbol(row.policy, on_front=row.pareto_active_experts or row.pareto_speed),
        "quality": value("exact_match", ".3f"),
        "loss": f"{loss.point:+.3f}" if loss is not None else "–",
        "interval": f"{loss.low:+.3f} to {loss.high:+.3f}" if loss is not None and loss.low is not None else "",
        "bar": charts.interval(loss.point, loss.low, loss.high, span=span, allowed=max_loss) if loss is not None else "",
        "before": value("active_experts_before", ".1f"),
        "after": value("active_experts_after", ".1f"),
        "after_change": change("active_experts_after"),
        "speed": value("tokens_per_s", ",.0f"),
        "speed_change": change("tokens_per_s"),
        "rerouted": value("rerouted_share", ".1%") if not row.is_baseline else "–",
        "output": value("mean_generated_tokens", ".1f"),
    }


def _scatters(rows: list[Row], numbers: dict[str, int]) -> list[tuple[str, Any]]:
    found = []
    for metric, title, x_label, mark in (
        ("active_experts_after", "Quality and active experts", "active experts per step and layer", "pareto_active_experts"),
        ("tokens_per_s", "Quality and speed", "tokens/s", "pareto_speed"),
    ):
        points = [
            charts.Point(
                row.metrics[metric],
                row.metrics["exact_match"],
                numbers[row.run_id],
                row.label,
                row.policy,
                getattr(row, mark),
                row.recommended,
            )
            for row in rows
            if metric in row.metrics and "exact_match" in row.metrics
        ]
        if points:
            found.append((title, charts.scatter(points, x_label=x_label, y_label="exact match")))
    return found


def _tasks(rows: list[Row], numbers: dict[str, int], baseline: Row | None) -> dict[str, Any]:
    """Exact match by task and configuration, with the strength of a cell's colour: the difference, full at 0.25."""
    shown = [row for row in rows if row.by_task]
    known = baseline.by_task if baseline is not None else {}
    table = []
    for task in sorted({task for row in shown for task in row.by_task}):
        cells = []
        for row in shown:
            value = row.by_task.get(task)
            gap = value - known[task] if value is not None and task in known and row is not baseline else 0.0
            style = "worse" if gap < 0 else "better" if gap > 0 else ""
            cells.append((f"{value:.2f}" if value is not None else "–", style, f"{min(1, abs(gap) / 0.25):.2f}", f"{gap:+.3f}"))
        table.append((task, cells))
    return {"tasks": table, "task_columns": [(numbers[row.run_id], row.label) for row in shown]}


def _panels(rows: list[Row], numbers: dict[str, int], uri: str, metrics: tuple[str, ...], x_label: str) -> list[Any]:
    """A small chart for each run that has the histories; all with the same axes. The first of two metrics is grey."""
    styles = [*(["before"] if len(metrics) > 1 else []), "after"]
    histories = {}
    for row in rows:
        if all(metric in row.metrics for metric in metrics):
            histories[row.run_id] = [read_history(uri, row.run_id, metric) for metric in metrics]
    points = [point for lines in histories.values() for line in lines for point in line]
    if not points:
        return []
    steps, high = [x for x, _ in points], max(y for _, y in points)
    found = []
    for row in rows:
        if row.run_id in histories:
            number, lines = numbers[row.run_id], histories[row.run_id]
            drawn = [
                charts.Line(line, f"{style} p-{charts.style_of(row.policy)}")
                for line, style in zip(lines, styles, strict=True)
                if line
            ]
            label = f"{number}. {row.label}"
            chart = charts.panel(drawn, x_label=x_label, x_range=(min(steps), max(steps)), high=high, label=label)
            found.append((number, row.label, chart))
    return found


def _heatmaps(rows: list[Row], uri: str) -> tuple[list[str], str, str]:
    """Pictures of the similarity that the recommended (else the first) sere configuration used: PNG in base64.

    Returns:
        The pictures, what they are of, and a note if there are none though there should be.
    """
    users = sorted((row for row in rows if row.policy == "sere"), key=lambda row: not row.recommended)
    if not users:
        return [], "", ""
    params, source = users[0].params, similarity_of(users[0].params)
    metric, digest = params["reroute.metric"], params.get("similarity_digest")
    try:
        # As it was then: an alias may have moved, and a path may hold another artifact by now.
        artifact = load_artifact(params.get("similarity_version") or params["reroute.similarity"], uri=uri, digest=digest)
        artifact.matrix(artifact.layers[0], metric)
    except (ConfigError, OSError) as error:
        return [], "", f"no similarity heatmaps, as {source} cannot be read: {error}"
    layers, found = artifact.layers, []
    if len(layers) > _MAX_HEATMAPS:
        # From the first to the last, evenly.
        layers = [layers[round(i * (len(layers) - 1) / (_MAX_HEATMAPS - 1))] for i in range(_MAX_HEATMAPS)]
    few = dataclasses.replace(artifact, manifest={**artifact.manifest, "layers": layers, "metrics": [metric]})
    for _, figure in heatmaps(few):
        opened = io.BytesIO()
        figure.savefig(opened, format="png", dpi=90)
        found.append(base64.b64encode(opened.getvalue()).decode())
    return found, f"{source}, metric {metric}", ""


def _settings(rows: list[Row]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, with each run's value."""
    keys = sorted({key for row in rows for key in row.params if not key.startswith(_UNTOLD)})
    values = {key: [row.params.get(key, "–") for row in rows] for key in keys}
    return [(key, found) for key, found in values.items() if len(set(found)) > 1]
