"""Tables of an artifact: its manifest and its quality, for the terminal."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sere.calibration_jobs.judge.candidates import RANDOM
from sere.calibration_jobs.publish.numbers import best_metric, transfer_table
from sere.conf.errors import ConfigError
from sere.conf.nested import flatten

if TYPE_CHECKING:
    from rich.table import Table

    from sere.ops.similarity import SimilarityArtifact


def new_table(title: str, *columns: str) -> "Table":
    """An empty table; its first column is text, the others are numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, style="table.title"), box=box.SIMPLE_HEAD, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if number else "left")
    return table


def add_row(table: "Table", *cells: str) -> None:
    """Add a row as it is: names of models, domains and metrics may look like rich's markup."""
    from rich.text import Text

    table.add_row(*map(Text, cells))


@contextmanager
def refuse_damaged(where: str) -> Iterator[None]:
    """For what reads a manifest's or a quality record's figures, which may be anybody's.

    Raises:
        ConfigError: if they are not what `sere calibrate` writes there.
    """
    try:
        yield
    except ConfigError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{where} has a manifest or figures that `sere calibrate` did not write ({reason:.120}): calibrate again"
        ) from error


def manifest_rows(artifact: "SimilarityArtifact") -> dict[str, str]:
    """An artifact's manifest without its quality, as flat text; long lists by their ends."""

    def shown(value: Any) -> str:
        return f"{value[0]} ... {value[-1]} ({len(value)})" if isinstance(value, list) and len(value) > 8 else str(value)

    manifest = flatten({key: value for key, value in artifact.manifest.items() if key != "quality"})
    return {key: shown(value) for key, value in manifest.items()}


def layer_tables_table(artifact: "SimilarityArtifact") -> "Table":
    """The tables that every layer has beside its similarities, and what they take."""
    table = new_table(f"Tables of each of {len(artifact.layers)} layers", "table", "type", "shape", "KiB in all layers")
    for name in artifact.table_names:
        tensors = [artifact.tables[layer, name] for layer in artifact.layers]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**10
        add_row(table, name, str(tensors[0].dtype).removeprefix("torch."), str(list(tensors[0].shape)), f"{size:,.1f}")
    return table


def table_differences(a: "SimilarityArtifact", b: "SimilarityArtifact") -> "Table":
    """How the tables of two artifacts of one model differ; no row where they are the same."""
    table = new_table("Tables", "different", "A", "B", "layers that differ", "largest difference")
    for name in dict.fromkeys((*a.table_names, *b.table_names)):
        if name not in a.table_names or name not in b.table_names:
            add_row(table, name, *("yes" if name in one.table_names else "no" for one in (a, b)), "", "")
            continue
        pairs = [(a.tables[layer, name], b.tables[layer, name]) for layer in a.layers]
        if any(first.shape != second.shape for first, second in pairs):
            add_row(table, name, *(str(list(tensor.shape)) for tensor in pairs[0]), str(len(pairs)), "")
            continue
        gaps = [(first.double() - second.double()).abs().max().item() for first, second in pairs]
        if any(gaps):
            add_row(table, name, "yes", "yes", str(sum(gap > 0 for gap in gaps)), f"{max(gaps):.4g}")
    return table


def quality_tables(quality: Mapping[str, Any]) -> list["Table"]:
    """The figures of a quality record as tables."""
    found = []
    if quality.get("reliability"):
        last = quality["reliability"][-1]
        table = new_table(
            f"Reliability: two halves of {last['num_tokens']} tokens", "metric", "rank correlation", "same nearest expert"
        )
        for metric, figures in last["metrics"].items():
            add_row(table, metric, f"{figures['spearman']:.3f}", f"{figures['decision']:.3f}")
        found.append(table)
    for metric, figures in quality.get("transfer", {}).items():
        table = new_table(f"Transfer, {metric}: rank correlation / same nearest expert", "domain", *figures["domains"])
        for domain, *values in zip(figures["domains"], figures["spearman"], figures["decision"], strict=True):
            add_row(table, domain, *(f"{a:.3f} / {b:.3f}" for a, b in zip(*values, strict=True)))
        found.append(table)
    sources, rows = transfer_table(dict(quality))
    if rows:
        table = new_table("Held-out error by source of the matrices", "tokens of", *sources)
        for domain, errors in rows.items():
            add_row(table, domain, *(f"{errors[source]:.4f}" for source in sources))
        found.append(table)
    if quality.get("held_out"):
        found.append(_held_out_table(quality))
    if quality.get("emulation"):
        table = new_table(
            "Teacher-forced decode emulation",
            *("policy", "batch", "S", "active experts", "charged", "perplexity", "KL", "same next token"),
        )
        for row in quality["emulation"]:
            add_row(
                table,
                row["policy"],
                str(row["batch_size"]),
                str(row["primary_top_k"] or "-"),
                f"{row['active_experts']:.1f}",
                f"{row.get('charged_experts', row['active_experts']):.1f}",
                f"{row['perplexity']:.4f}",
                f"{row['kl']:.5f}",
                f"{row['agreement']:.4f}",
            )
        found.append(table)
    return found


def _held_out_table(quality: Mapping[str, Any]) -> "Table":
    from rich.text import Text

    table = new_table(
        "Held-out re-routing error (relative error of a layer's output, mean over layers)",
        "matrices", "batch", "S", "threshold", "error", "of random", "alignment", "critical", "active before", "after",
    )  # fmt: skip
    random = {(r["batch_size"], r["primary_top_k"]): r["error"] for r in quality["held_out"] if r["candidate"] == RANDOM}
    for row in quality["held_out"]:
        against = random.get((row["batch_size"], row["primary_top_k"]))
        add_row(
            table,
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
    text = f"lowest error at S={reference['primary_top_k']}, batch {reference['batch_size']}: {best}"
    table.caption = Text(text, style="table.caption")
    return table
