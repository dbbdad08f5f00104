"""The comparison as tables on the terminal, a CSV file and a picture."""

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from sere.conf.whole_file import written_whole
from sere.pipeline.compare.runs import Row, baseline_of, difference

if TYPE_CHECKING:
    from matplotlib.figure import Figure
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
# What the comparison itself adds.
_FOUND = ("loss", "loss_low", "loss_high", "pareto_active_experts", "pareto_speed", "recommended")


_CAPTION = "> recommended; on the Pareto front of quality: * against active experts, + against tokens/s"
_MIXED = "; ~ decoded in batches of several sizes: left out of the recommendation"
# More columns than these fold on any terminal.
_MAX_TASKS = 24


def _marks(row: Row) -> str:
    return ">" * row.recommended + "*" * row.pareto_active_experts + "+" * row.pareto_speed + "~" * row.is_mixed


def _interval(row: Row) -> str:
    return "-" if row.loss is None or row.loss.low is None else f"{row.loss.low:+.3f}..{row.loss.high:+.3f}"


def make_table(rows: list[Row], experiment: str) -> "Table":
    """The table that `sere compare` prints. Differences to the unmodified model are in brackets."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    batches = sorted({row.batch for row in rows})
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{escape(experiment)}: decode batch {', '.join(batches)}; in brackets: difference to the unmodified model",
        title_style="bold",
        caption=_CAPTION + (_MIXED if any(row.is_mixed for row in rows) else ""),
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    # The only column that folds where there is no room: digits are not cut.
    table.add_column("configuration", overflow="fold")
    with_intervals = any(row.loss is not None and row.loss.low is not None for row in rows)
    for name in (
        "exact match",
        *(["95% interval\nof the loss"] if with_intervals else []),
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
        gap = difference(row, baseline_of(row, rows), metric) if difference_form else None
        extra = f" ({gap:{difference_form}})" if gap is not None else ""
        return f"{row.metrics[metric]:{form}}{extra}"

    for row in rows:
        metrics = row.metrics
        # They have no counterpart in the unmodified model.
        shares = [
            f"{metrics[name]:.1%}" if not row.is_baseline and name in metrics else "-"
            for name in ("rerouted_share", "critical_share")
        ]
        cells = [
            cell(row, "exact_match", ".3f", "+.3f"),
            *([_interval(row)] if with_intervals else []),
            cell(row, "active_experts_before", ".1f"),
            cell(row, "active_experts_after", ".1f", "+.1f"),
            cell(row, "mixed_step_share", ".0%"),
            *shares,
            cell(row, "tokens_per_s", ".0f", "+.0f"),
            cell(row, "mean_generated_tokens", ".1f", "+.1f"),
        ]
        table.add_row(_marks(row), escape(row.label), *cells, *([row.batch] if len(batches) > 1 else []))
    return table


def make_task_table(rows: list[Row]) -> "Table | None":
    """Exact match per task, if any run has tasks."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    tasks = sorted({task for row in rows for task in row.by_task})
    if not tasks:
        return None
    title = "exact match by task"
    if len(tasks) > _MAX_TASKS:
        title += f": {_MAX_TASKS} of {len(tasks)} tasks, all are in compare.csv"
        tasks = tasks[:_MAX_TASKS]
    table = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("configuration", no_wrap=True)
    for task in tasks:
        table.add_column(escape(task), justify="right")
    for row in rows:
        table.add_row(escape(row.label), *(f"{row.by_task[task]:.2f}" if task in row.by_task else "-" for task in tasks))
    return table


def write_csv(rows: list[Row], file: Path) -> None:
    """All numbers of the table, and what tells configurations apart."""
    tasks = sorted({task for row in rows for task in row.by_task})
    header = ["configuration", "policy", "model", "data", "decode_batch", "run_id", *_COLUMNS]
    header += [f"difference_{name}" for name in _DIFFERENCES] + [f"exact_match/{task}" for task in tasks] + [*_FOUND]
    with written_whole(file) as aside, aside.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(header)
        for row in rows:
            baseline, settings = baseline_of(row, rows), dict(row.group)
            numbers = [row.metrics.get(name) for name in _COLUMNS]
            numbers += [difference(row, baseline, name) for name in _DIFFERENCES] + [row.by_task.get(task) for task in tasks]
            loss = [None] * 3 if row.loss is None else [row.loss.point, row.loss.low, row.loss.high]
            found = [*loss, row.pareto_active_experts, row.pareto_speed, row.recommended]
            writer.writerow(
                [row.label, row.policy, settings["model"], settings["data"], row.batch, row.run_id, *numbers, *found]
            )


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
            s=140 if row.is_baseline else 70,
            label=row.label,
        )
    axes.set(xlabel="active experts per decode step and layer", ylabel="exact match")
    axes.set_title(f"decode batch {', '.join(sorted({row.batch for row in points}))}")
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
