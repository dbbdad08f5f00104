"""`sere compare`: the generate runs of an experiment as tables, a CSV file, a picture and a web page, and which one to take."""

import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sere.conf.errors import ConfigError
from sere.pipeline.compare.losses import Loss, loss_of, read_scores
from sere.pipeline.compare.page import write_report
from sere.pipeline.compare.pareto import OBJECTIVES, Group, recommend, with_fronts
from sere.pipeline.compare.runs import Row, difference, groups_of, rows_of
from sere.pipeline.compare.table import make_figure, make_table, make_task_table, write_csv
from sere.pipeline.evaluate.scorers import SCORES_FILE
from sere.pipeline.tracking.runs import download_file, read_history, read_runs

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console

_PROGRESS = "progress/tokens_per_s"
# Fewer do not say how much speeds vary.
_LEAST_SPEEDS = 4


def _scores(row: Row, uri: str, folder: Path, notes: list[str]) -> "pa.Table | None":
    """Hits of a run's single rows, if it recorded them."""
    try:
        file = download_file(uri, row.run_id, SCORES_FILE, folder=folder / row.run_id)
        return read_scores(file) if file is not None else None
    except ConfigError as error:
        # The figures of the whole run are still worth comparing.
        notes.append(f"{row.label}: no interval of the loss, as {error}")
        return None


def with_losses(rows: list[Row], *, uri: str, notes: list[str]) -> list[Row]:
    """Comparable rows with their losses: from scores of rows where both runs have them, else from their exact match.

    Args:
        rows: One group.
        uri: MLflow tracking URI.
        notes: Gets a line for each run whose scores cannot be read.
    """
    baseline = next((row for row in rows if row.is_baseline), None)
    if baseline is None:
        return rows
    found = []
    with tempfile.TemporaryDirectory(prefix="sere-scores-") as scratch:
        folder = Path(scratch)
        reference = _scores(baseline, uri, folder, notes)
        for row in rows:
            gap = difference(row, baseline, "exact_match")
            loss = Loss(-gap) if gap is not None else None
            if row is not baseline and reference is not None:
                scores = _scores(row, uri, folder, notes)
                loss = (loss_of(reference, scores) if scores is not None else None) or loss
            found.append(dataclasses.replace(row, loss=loss))
    return found


def with_speed_errors(rows: list[Row], *, uri: str) -> list[Row]:
    """Rows with the standard errors of their speeds, from how these varied during the runs."""
    found = []
    for row in rows:
        values = [value for _, value in read_history(uri, row.run_id, _PROGRESS)] if _PROGRESS in row.metrics else []
        # While engines start and stop, speeds say nothing.
        values = [value for value in values[1:-1] if value > 0]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) >= _LEAST_SPEEDS else None
        found.append(dataclasses.replace(row, speed_error=error))
    return found


def analyse(rows: list[Row], *, uri: str, max_loss: float, by: str) -> tuple[list[Group], list[str]]:
    """Losses, fronts and a recommendation within each group of comparable rows; and notes on what could not be read."""
    groups: list[Group] = []
    notes: list[str] = []
    for name, members in groups_of(rows).items():
        members = with_fronts(with_speed_errors(with_losses(members, uri=uri, notes=notes), uri=uri))
        choice = recommend(members, by=by, max_loss=max_loss)
        groups.append(Group(name, [dataclasses.replace(row, recommended=row is choice.row) for row in members], choice))
    return groups, notes


def compare(
    experiment: str, *, uri: str, output: str, console: "Console", max_loss: float = 0.02, by: str = "speed"
) -> list[Row]:
    """Print tables and a recommendation, write `report.html`, `compare.csv` and `compare.png`, and return the rows.

    Args:
        experiment: MLflow experiment.
        uri: MLflow tracking URI.
        output: Folder to write to.
        console: Where to print.
        max_loss: Quality loss allowed for the recommended configuration.
        by: What it is chosen by, a key of `OBJECTIVES`.

    Raises:
        ConfigError: if the experiment does not exist or has no finished generate run, or an argument is out of range.
    """
    if not 0 <= max_loss <= 1:
        raise ConfigError(f"--max-loss must be between 0 and 1, got {max_loss}")
    if by not in OBJECTIVES:
        raise ConfigError(f"--by must be one of {', '.join(OBJECTIVES)}, got {by!r}")
    rows = rows_of(read_runs(uri, experiment))
    if not rows:
        raise ConfigError(f"experiment {experiment!r} has no finished run of `sere generate` yet")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    groups, notes = analyse(rows, uri=uri, max_loss=max_loss, by=by)
    found = {row.run_id: row for group in groups for row in group.rows}
    rows = [found[row.run_id] for row in rows]
    console.print(make_table(rows, experiment))
    tasks = make_task_table(rows)
    if tasks is not None:
        console.print(tasks)
    for group in groups:
        text = group.recommendation.text
        console.print(f"{group.name}: {text}" if group.name else text, soft_wrap=True, highlight=False, markup=False)
    write_csv(rows, folder / "compare.csv")
    written = [str(folder / "compare.csv")]
    figure = make_figure(rows)
    if figure is not None:
        figure.savefig(folder / "compare.png", dpi=150)
        written.append(str(folder / "compare.png"))
    page = folder / "report.html"
    notes = write_report(page, groups, experiment=experiment, uri=uri, max_loss=max_loss, notes=notes)
    written.append(str(page))
    for note in notes:
        console.print(f"Note: {note}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"Wrote {', '.join(written)}", soft_wrap=True, highlight=False, markup=False)
    return rows
