"""Pictures of an artifact and its quality."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sere.calibration_jobs.judge.candidates import CHAMPION, RANDOM, UNMODIFIED
from sere.calibration_jobs.publish.numbers import transfer_table
from sere.pipeline.compare.heatmaps import heatmaps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sere.ops.similarity import SimilarityArtifact

_RANDOM_STYLE: dict[str, Any] = {"color": "black", "linestyle": "--"}


def _new(width: float = 6.4, height: float = 4.4) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def reliability(growth: list[dict[str, Any]]) -> "Figure":
    """Agreement of two halves of the data against the tokens in both."""
    figure, axes = _new()
    tokens = [step["num_tokens"] for step in growth]
    for number, metric in enumerate(growth[-1]["metrics"]):
        for name, style in (("spearman", "-"), ("decision", ":")):
            values = [step["metrics"][metric][name] for step in growth]
            label = f"{metric}, {'rank correlation' if name == 'spearman' else 'same nearest expert'}"
            axes.plot(tokens, values, style, color=f"C{number}", marker="o", markersize=3, label=label)
    axes.set(xscale="log", xlabel="calibration tokens (both halves)", ylabel="agreement of the halves", ylim=(None, 1.02))
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return figure


def transfer_heatmaps(quality: dict[str, Any]) -> Iterator[tuple[str, "Figure"]]:
    """Agreement between domains' matrices for each metric; and the error of each domain's matrices on each domain's tokens."""
    from matplotlib.figure import Figure

    for metric, found in quality.get("transfer", {}).items():
        figure = Figure(figsize=(9, 4), layout="constrained")
        for panel, name in zip(figure.subplots(1, 2), ("spearman", "decision"), strict=True):
            _table(panel, found[name], found["domains"], found["domains"])
            panel.set_title(f"{metric}: {'rank correlation' if name == 'spearman' else 'same nearest expert'}")
        yield f"transfer/{metric}.png", figure
    sources, rows = transfer_table(quality)
    if rows:
        figure, axes = _new(2 + 1.3 * len(sources), 1.6 + 0.7 * len(rows))
        _table(axes, [[row[source] for source in sources] for row in rows.values()], list(rows), sources, cmap="viridis_r")
        axes.set(title="held-out error", xlabel="matrices from", ylabel="tokens of")
        yield "transfer/held_out_error.png", figure


def _table(axes: "Axes", values: list[list[float]], rows: list[str], columns: list[str], cmap: str = "viridis") -> None:
    axes.imshow(values, cmap=cmap, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=20, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.3f}", ha="center", va="center", color="white", backgroundcolor=(0, 0, 0, 0.35))


def held_out_error(quality: dict[str, Any]) -> "Figure":
    """Error against active experts: every metric over its thresholds and S, beside a random primary expert."""
    from matplotlib.figure import Figure

    rows = [row for row in quality["held_out"] if row["candidate"] != CHAMPION]
    sizes = sorted({row["batch_size"] for row in rows})
    figure = Figure(figsize=(4.6 * len(sizes), 4.2), layout="constrained")
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    for panel, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for number, name in enumerate(names):
            style = _RANDOM_STYLE if name == RANDOM else {"color": f"C{number}"}
            for count, top_k in enumerate(sorted({row["primary_top_k"] for row in rows})):
                line = [r for r in rows if (r["candidate"], r["batch_size"], r["primary_top_k"]) == (name, size, top_k)]
                points = sorted((row["active_after"], row["error"]) for row in line)
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=None if count else name, **style)
        panel.set(title=f"decode batch {size}", xlabel="active experts per step and layer", ylim=(0, None))
        panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    figure.axes[0].set_ylabel("relative error of the layer's output")
    return figure


def emulation(quality: dict[str, Any]) -> "Figure":
    """KL divergence to the unmodified model against active experts, one line per policy."""
    figure, axes = _new()
    rows = [row for row in quality["emulation"] if row["policy"] != UNMODIFIED]
    for number, (policy, size) in enumerate(dict.fromkeys((row["policy"], row["batch_size"]) for row in rows)):
        line = sorted(
            (row["active_experts"], row["kl"]) for row in rows if (row["policy"], row["batch_size"]) == (policy, size)
        )
        style = _RANDOM_STYLE if policy == RANDOM else {"color": f"C{number}"}
        axes.plot(*zip(*line, strict=True), marker="o", markersize=3, label=f"{policy}, batch {size}", **style)
    axes.set(yscale="log", xlabel="active experts per step and layer", ylabel="KL to the unmodified model (nats a token)")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return figure


def all_pictures(artifact: "SimilarityArtifact", quality: dict[str, Any]) -> Iterator[tuple[str, "Figure"]]:
    """Path and picture, of everything there is."""
    yield from heatmaps(artifact)
    if quality.get("reliability"):
        yield "reliability.png", reliability(quality["reliability"])
    yield from transfer_heatmaps(quality)
    if quality.get("held_out"):
        yield "held_out_error.png", held_out_error(quality)
    if any(row["policy"] != UNMODIFIED for row in quality.get("emulation", ())):
        yield "emulation.png", emulation(quality)
