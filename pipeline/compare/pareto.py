"""Which configurations are worth having: the Pareto front, and the one to take."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
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
    """safe: even the interval's upper end is within the loss allowed, corrected for the number of configurations that were
    to choose from; likely: only the point estimate is; unknown: there is no
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

    Speeds that differ by less than their noise are equal. Runs in batches of several sizes are left out.

    Args:
        rows: One group, with losses.
        by: A key of `OBJECTIVES`.
        max_loss: Quality loss allowed.
    """
    metric, sign = OBJECTIVES[by]
    rows = [row for row in rows if not row.is_mixed]
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
    best = min((row for row in within if not _differs(row, within[0], metric)), key=lambda row: _loss(row).point)
    loss = _loss(best)
    if metric in baseline.metrics and not _is_better(best, baseline, metric, sign):
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
    certain = _within_for_sure(others, limit)
    among = f" for {len(others)} configurations to choose from (Holm)" if len(others) > 1 else ""
    if best.run_id in certain:
        return Recommendation(f"{start}, safe: even the interval's upper end is within{among}.", "safe", best)
    safe = next((row for row in within if row.run_id in certain), None)
    if safe is not None and metric in baseline.metrics and not _is_better(safe, baseline, metric, sign):
        safe = None
    also = f"; safe would be {safe.label} ({_gain(safe, baseline, by)})" if safe is not None else ""
    if loss.high <= limit:
        among = f"only the upper end of its own interval is within, not the one{among}"
    else:
        among = "only the point estimate is within, not the upper end"
    return Recommendation(f"{start}, likely: {among}{also}.", "likely", best)


def _within_for_sure(rows: list[Row], limit: float) -> set[str]:
    """Of the rows with intervals, those whose loss is within the limit at 97.5%, all of them together (Holm 1979).

    Whoever takes the cheapest of many takes one that was lucky. The interval's upper half is taken for that of a normal
    distribution, and made as wide as the step needs.
    """
    found: set[str] = set()
    normal = NormalDist()

    def p_value(row: Row) -> float:
        loss = _loss(row)
        assert loss.high is not None
        error = (loss.high - loss.point) / normal.inv_cdf(0.975)
        return normal.cdf((loss.point - limit) / error) if error > 0 else float(loss.point > limit)

    ordered = sorted((p_value(row), row.run_id) for row in rows if _loss(row).high is not None)
    for place, (value, run_id) in enumerate(ordered):
        # A hair more, as the limit is: an upper end that is the limit is within.
        if value > 0.025 / (len(rows) - place) + 1e-6:
            break
        found.add(run_id)
    return found


def _differs(row: Row, other: Row, metric: str) -> bool:
    """Whether two rows' costs are not the same: speeds have to differ by more than their noise (95%), where that is known."""
    gap = abs(row.metrics[metric] - other.metrics[metric])
    if metric != OBJECTIVES["speed"][0] or row.speed_error is None or other.speed_error is None:
        return gap > 0
    return gap > NormalDist().inv_cdf(0.975) * math.hypot(row.speed_error, other.speed_error)


def _is_better(row: Row, baseline: Row, metric: str, sign: int) -> bool:
    return sign * row.metrics[metric] < sign * baseline.metrics[metric] and _differs(row, baseline, metric)


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
