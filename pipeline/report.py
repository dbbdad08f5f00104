"""`sere compare`: the generate runs of an MLflow experiment as a table, a CSV file and a picture."""

import csv
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration_jobs.tracking import read_runs
from conf.schema import ConfigError, RerouteConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

# Metrics of a run that become columns of the CSV file, in order.
_COLUMNS = (
    "exact_match",
    "active_experts_before",
    "active_experts_after",
    "rerouted_share",
    "critical_share",
    "tokens_per_s",
    "mean_generated_tokens",
    "decode_rows_per_step",
    "mixed_step_share",
    "decode_only_active_experts_before",
    "decode_only_active_experts_after",
    "num_rows",
    "num_errors",
)
# Compared with the unmodified model.
_DIFFERENCES = ("exact_match", "active_experts_after", "tokens_per_s", "mean_generated_tokens")


@dataclass(frozen=True)
class Row:
    """One configuration: its latest run."""

    label: str
    policy: str
    group: tuple[str, ...]
    """What has to be equal for two runs to be compared: model, data, decode batch, sampling."""
    run_id: str
    metrics: dict[str, float]
    by_task: dict[str, float]


def _is_baseline(row: Row) -> bool:
    return row.policy == "none"


# What makes two runs comparable, and their difference one of re-routing.
_GROUP = (
    "model",
    "data",
    "num_rows",
    "engine.max_num_seqs",
    "batch_size",
    "concurrent_batches",
    "sampling.max_tokens",
    "sampling.temperature",
    "sampling.top_p",
    "sampling.seed",
    "engine.dtype",
)
# Settings of which a label speaks only where they are not the default.
_OPTIONAL = ("phase", "min_tokens", "max_tokens", "seed")


def _label(params: dict[str, str], *, with_similarity: bool) -> tuple[str, str]:
    """A short name of a configuration, and its policy."""
    policy = params.get("reroute.policy", "none")
    if policy == "none":
        return "unmodified", "none"
    parts = [f"{policy} S={params['reroute.primary_top_k']}"]
    if policy == "sere":
        parts.append(f"{params['reroute.metric']} rho={float(params['reroute.threshold']):g}")
        if with_similarity:
            parts.append(params["reroute.similarity"])
    for field in dataclasses.fields(RerouteConfig):
        value = params.get(f"reroute.{field.name}", str(field.default))
        if field.name in _OPTIONAL and value != str(field.default):
            parts.append(f"{field.name}={value}")
    return ", ".join(parts), policy


def rows_of(runs: list[dict[str, Any]]) -> list[Row]:
    """The latest run of each configuration, unmodified first, then in order of first appearance.

    Runs that decode another model or data, or in other batches, are other configurations.
    """
    used = {run["params"].get("reroute.similarity") for run in runs if run["params"].get("reroute.policy") == "sere"}
    latest: dict[tuple[Any, ...], Row] = {}
    for run in runs:
        params, metrics = run["params"], run["metrics"]
        label, policy = _label(params, with_similarity=len(used) > 1)
        group = tuple(params.get(key, "") for key in _GROUP)
        by_task = {k.removeprefix("exact_match/"): v for k, v in metrics.items() if k.startswith("exact_match/")}
        latest[(label, *group)] = Row(label, policy, group, run["run_id"], metrics, by_task)
    return sorted(latest.values(), key=lambda row: not _is_baseline(row))


def _baseline(row: Row, rows: list[Row]) -> Row | None:
    return next((other for other in rows if _is_baseline(other) and other.group == row.group), None)


def _difference(row: Row, baseline: Row | None, metric: str) -> float | None:
    if baseline is None or baseline is row or metric not in row.metrics or metric not in baseline.metrics:
        return None
    return row.metrics[metric] - baseline.metrics[metric]


def _batch(row: Row) -> str:
    return row.group[_GROUP.index("engine.max_num_seqs")]


def make_table(rows: list[Row], experiment: str) -> "Table":
    """The table that `sere compare` prints. Differences to the unmodified model are in brackets."""
    from rich import box
    from rich.table import Table

    batches = sorted({_batch(row) for row in rows})
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{experiment}: decode batch {', '.join(batches)}; in brackets: difference to the unmodified model",
        title_style="bold",
    )
    table.add_column("configuration", no_wrap=True)
    for name in (
        "exact match",
        "active\nbefore",
        "experts\nafter",
        "mixed\nsteps",
        "re-\nrouted",
        "critical",
        "tokens/s",
        "output\ntokens",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    if len(batches) > 1:
        table.add_column("batch", justify="right")

    def cell(row: Row, metric: str, form: str, difference_form: str = "") -> str:
        if metric not in row.metrics:
            return "-"
        difference = _difference(row, _baseline(row, rows), metric) if difference_form else None
        extra = f" ({difference:{difference_form}})" if difference is not None else ""
        return f"{row.metrics[metric]:{form}}{extra}"

    for row in rows:
        metrics = row.metrics
        # They have no counterpart in the unmodified model.
        shares = [
            f"{metrics[name]:.1%}" if not _is_baseline(row) and name in metrics else "-"
            for name in ("rerouted_share", "critical_share")
        ]
        cells = [
            cell(row, "exact_match", ".3f", "+.3f"),
            cell(row, "active_experts_before", ".1f"),
            cell(row, "active_experts_after", ".1f", "+.1f"),
            cell(row, "mixed_step_share", ".0%"),
            *shares,
            cell(row, "tokens_per_s", ".0f", "+.0f"),
            cell(row, "mean_generated_tokens", ".1f", "+.1f"),
        ]
        table.add_row(row.label, *cells, *([_batch(row)] if len(batches) > 1 else []))
    return table


def make_task_table(rows: list[Row]) -> "Table | None":
    """Exact match per task, if any run has tasks."""
    from rich import box
    from rich.table import Table

    tasks = sorted({task for row in rows for task in row.by_task})
    if not tasks:
        return None
    table = Table(title="exact match by task", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("configuration", no_wrap=True)
    for task in tasks:
        table.add_column(task, justify="right")
    for row in rows:
        table.add_row(row.label, *(f"{row.by_task[task]:.2f}" if task in row.by_task else "-" for task in tasks))
    return table


def write_csv(rows: list[Row], file: Path) -> None:
    """All numbers of the table, and what tells configurations apart; written aside, then renamed."""
    tasks = sorted({task for row in rows for task in row.by_task})
    header = ["configuration", "policy", "model", "data", "decode_batch", "run_id", *_COLUMNS]
    header += [f"difference_{name}" for name in _DIFFERENCES] + [f"exact_match/{task}" for task in tasks]
    aside = file.with_name(f".{file.name}.aside")
    with aside.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(header)
        for row in rows:
            baseline = _baseline(row, rows)
            differences = [_difference(row, baseline, name) for name in _DIFFERENCES]
            numbers = [row.metrics.get(name) for name in _COLUMNS] + differences + [row.by_task.get(task) for task in tasks]
            writer.writerow([row.label, row.policy, row.group[0], row.group[1], _batch(row), row.run_id, *numbers])
    os.replace(aside, file)


def make_figure(rows: list[Row]) -> "Figure | None":
    """Quality against active experts, a point per configuration; None if no run has both."""
    from matplotlib.figure import Figure

    points = [row for row in rows if "exact_match" in row.metrics and "active_experts_after" in row.metrics]
    if not points:
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    markers = {"none": "*", "sere": "o", "random": "s", "top_k": "^"}
    for row in points:
        axes.scatter(
            row.metrics["active_experts_after"],
            row.metrics["exact_match"],
            marker=markers.get(row.policy, "x"),
            s=140 if _is_baseline(row) else 70,
            label=row.label,
        )
    axes.set(xlabel="active experts per decode step and layer", ylabel="exact match")
    axes.set_title(f"decode batch {', '.join(sorted({_batch(row) for row in points}))}")
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def compare(experiment: str, *, uri: str, output: str, console: "Console") -> list[Row]:
    """Print the table, write `compare.csv` and `compare.png`, and return the rows.

    Raises:
        ConfigError: if the experiment does not exist or has no finished generate run.
    """
    rows = rows_of(read_runs(uri, experiment))
    if not rows:
        raise ConfigError(f"experiment {experiment!r} has no finished run of `sere generate` yet")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    console.print(make_table(rows, experiment))
    tasks = make_task_table(rows)
    if tasks is not None:
        console.print(tasks)
    write_csv(rows, folder / "compare.csv")
    written = [str(folder / "compare.csv")]
    figure = make_figure(rows)
    if figure is not None:
        figure.savefig(folder / "compare.png", dpi=150)
        written.append(str(folder / "compare.png"))
    console.print(f"Wrote {', '.join(written)}", soft_wrap=True, highlight=False)
    return rows
