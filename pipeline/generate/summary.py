"""What `sere generate` prints at its end."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from sere.pipeline.generate.driver import Summary


def summary_lines(summary: "Summary") -> list[str]:
    """Where the results are, what they are, how fast they were made, and what re-routing did."""
    metrics, output = summary.metrics, summary.output.rstrip("/")
    first = f"Finished before: {output}/results" if summary.was_finished else f"Wrote {output}/results"
    lines = [f"{first}: {metrics['num_rows']:.0f} rows, {metrics['num_errors']:.0f} with errors"]
    if summary.was_finished:
        lines[0] += " (overwrite=true starts anew)"
    if metrics["num_errors"]:
        lines.append(f"  errors: {output}/errors.parquet")
    if "tokens_per_s" in metrics:
        lines.append(
            f"  {metrics['generated_tokens']:.0f} tokens in {metrics['generation_s']:.0f} s, "
            f"{metrics['tokens_per_s']:.0f} tokens/s (and {metrics['startup_s']:.0f} s to start engines)"
        )
    if metrics["num_sessions"] > 1 or metrics["num_replaced_replicas"]:
        lines.append(
            f"  interrupted {metrics['num_sessions'] - 1:.0f} times, {metrics['num_replaced_replicas']:.0f} replicas replaced"
        )
    if "exact_match" in metrics:
        lines.append(f"  exact match {metrics['exact_match']:.3f}")
    if "active_experts_after" in metrics:
        lines.append(
            f"  active experts per step {metrics['active_experts_before']:.1f} -> {metrics['active_experts_after']:.1f}, "
            f"{metrics['rerouted_share']:.0%} of slots re-routed"
        )
    if metrics.get("rerouted_share") and "rerouting_active_experts_after" in metrics:
        lines.append(
            f"  in steps that re-route and read no prompt {metrics['rerouting_active_experts_before']:.1f} -> "
            f"{metrics['rerouting_active_experts_after']:.1f} ({-metrics['rerouting_saved_share']:.0%})"
        )
    return lines


def print_summary(summary: "Summary", console: "Console") -> None:
    for line in summary_lines(summary):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
