"""Which configurations are worth having: the Pareto front, and the one to take."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sere.pipeline.compare.losses import Loss
from sere.pipeline.compare.runs import Row, difference

OBJECTIVES = {"speed": ("tokens_per_s", -1), "active_experts": ("active_experts_after", 1)}
"""What a configuration can be chosen by: its metric, and the sign that makes it a cost."""


def pareto_front(quality: Sequence[float | None], cost: Sequence[float | None]) -> list[bool]:
    """Of each point, whether no other one is at least as good in both and better in one.

    Points that are equal stand or fall together. A point with a missing value (None or NaN) is never on the front, and
    dominates none.

    Args:
        quality: Higher is better.
        cost: Lower is better.
    """
    front = [False] * len(quality)
    known = [
        (c, -q, i)
        for i, (q, c) in enumerate(zip(quality, cost, strict=True))
        if q is not None and c is not None and not math.isnan(q) and not math.isnan(c)
    ]
    best = None
    for c, negated, i in sorted(known):
        # In order of cost: on the front if better than all that cost less, or equal to the one that is.
        if best is None or negated < best[1]:
            best = (c, negated)
        front[i] = (c, negated) == best
    return front


def with_fronts(rows: list[Row]) -> list[Row]:
    """Comparable rows, marked where they are on the fronts of quality against active experts and against speed."""
    quality = [row.metrics.get("exact_match") for row in rows]
    fronts = {}
    for objective, (metric, sign) in OBJECTIVES.items():
        costs = [sign * row.metrics[metric] if metric in row.metrics else None for row in rows]
        fronts[objective] = pareto_front(quality, costs)
    marks = zip(fronts["active_experts"], fronts["speed"], strict=True)
    return [
        dataclasses.replace(row, pareto_active_experts=experts, pareto_speed=speed)
        for row, (experts, speed) in zip(rows, marks, strict=True)
    ]


@dataclass(frozen=True)
class Recommendation:
    """What to take of comparable rows."""

    text: str
    """One sentence."""
    certainty: Literal["safe", "likely", "unknown", "unmodified", "none"]
    """safe: even the interval's upper end is within the loss allowed; likely: only the point estimate is; unknown: there is no
    interval; unmodified: nothing but the unmodified model qualifies; none: the runs cannot tell."""
    row: Row | None = None


@dataclass(frozen=True)
class Group:
    """Comparable rows, and what to take of them; `analyse` fills it."""

    name: str
    """What tells it from the other groups; "" where there is one only."""
    rows: list[Row]
    recommendation: Recommendation


def recommend(rows: list[Row], *, by: str, max_loss: float) -> Recommendation:
    """The cheapest of comparable rows whose loss is within `max_loss`; of equally cheap ones that with the lowest loss.

    Args:
        rows: One group, with losses.
        by: A key of `OBJECTIVES`.
        max_loss: Quality loss allowed.
    """
    metric, sign = OBJECTIVES[by]
    baseline = next((row for row in rows if row.is_baseline), None)
    lossy = [row for row in rows if row.loss is not None and not row.is_baseline]
    others = [row for row in lossy if metric in row.metrics]
    if baseline is None:
        return Recommendation("No recommendation: no finished run of the unmodified model (reroute.policy=none).", "none")
    if not others:
        reason = f"no other run has {metric}" if lossy else "no other run has a quality that can be compared with its own"
        return Recommendation(f"No recommendation beside the unmodified model: {reason}.", "none")

    # 0.9 - 0.88 is above 0.02 in floating point.
    limit = max_loss + 1e-9

    def rank(row: Row) -> tuple[float, float]:
        return sign * row.metrics[metric], _loss(row).point

    within = sorted((row for row in others if _loss(row).point <= limit), key=rank)
    superlative, better = {
        "speed": ("fastest", "is faster"),
        "active_experts": ("one with the fewest active experts", "has fewer active experts"),
    }[by]
    if not within:
        least = min(others, key=lambda row: _loss(row).point)
        return Recommendation(
            f"Recommended: the unmodified model, as no configuration has a quality loss within {max_loss:g}; the least is "
            f"{describe_loss(_loss(least))} of {least.label}.",
            "unmodified",
            baseline,
        )
    best = within[0]
    loss = _loss(best)
    if metric in baseline.metrics and rank(best)[0] >= sign * baseline.metrics[metric]:
        return Recommendation(
            f"Recommended: the unmodified model, as no configuration with a quality loss within {max_loss:g} {better}.",
            "unmodified",
            baseline,
        )
    start = (
        f"Recommended: {best.label}, the {superlative} ({_gain(best, baseline, by)}) with a quality loss within {max_loss:g}: "
        f"it loses {describe_loss(loss)}"
    )
    if loss.high is None:
        return Recommendation(f"{start}; how sure that is cannot be said without scores of rows.", "unknown", best)
    if loss.high <= limit:
        return Recommendation(f"{start}, safe: even the interval's upper end is within.", "safe", best)
    safe = next((row for row in within if (high := _loss(row).high) is not None and high <= limit), None)
    if safe is not None and metric in baseline.metrics and rank(safe)[0] >= sign * baseline.metrics[metric]:
        safe = None
    also = f"; safe would be {safe.label} ({_gain(safe, baseline, by)})" if safe is not None else ""
    return Recommendation(f"{start}, likely: only the point estimate is within, not the upper end{also}.", "likely", best)


def describe_loss(loss: Loss) -> str:
    """The loss in words, with its interval."""
    if loss.low is None:
        return f"{loss.point:.4f}"
    return f"{loss.point:.4f} (95% interval {loss.low:.4f} to {loss.high:.4f}, {loss.num_rows} rows)"


def _loss(row: Row) -> Loss:
    assert row.loss is not None
    return row.loss


def _gain(row: Row, baseline: Row, by: str) -> str:
    metric, _ = OBJECTIVES[by]
    form = "{:.0f} tokens/s" if by == "speed" else "{:.1f} active experts"
    gap = difference(row, baseline, metric)
    relative = f", {gap / baseline.metrics[metric]:+.0%}" if gap is not None and baseline.metrics[metric] else ""
    return form.format(row.metrics[metric]) + relative
