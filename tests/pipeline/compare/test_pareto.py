"""Losses with their intervals, Pareto fronts and the recommendation, against definitions and simulated data."""

import dataclasses
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.conf.errors import ConfigError
from sere.pipeline.compare.losses import Loss, loss_of, paired_loss, read_scores
from sere.pipeline.compare.pareto import pareto_front, recommend, with_fronts
from sere.pipeline.compare.runs import Row
from tests.examples import examples

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300)
# Few values, so that ties are frequent.
VALUES = st.one_of(st.none(), st.just(math.nan), st.integers(-3, 3).map(float), st.floats(-1, 1))


def columns(pairs):
    return np.array(pairs, dtype=bool).T


@given(PAIRS)
def test_interval_contains_the_point(pairs):
    baseline, changed = columns(pairs)
    loss = paired_loss(baseline, changed, num_resamples=2000)
    assert loss.point == pytest.approx(baseline.mean() - changed.mean())
    assert -1 <= loss.low <= loss.point <= loss.high <= 1
    assert loss.num_rows == len(pairs)


@given(PAIRS)
def test_interval_is_deterministic_and_antisymmetric_and_ignores_order(pairs):
    baseline, changed = columns(pairs)
    loss = paired_loss(baseline, changed, num_resamples=2000)
    other = paired_loss(changed[::-1], baseline[::-1], num_resamples=2000)
    assert loss == paired_loss(baseline, changed, num_resamples=2000)
    assert (-other.point, -other.high, -other.low) == pytest.approx((loss.point, loss.low, loss.high))


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_identical_hits_lose_nothing(hits):
    assert paired_loss(np.array(hits), np.array(hits)) == Loss(0, 0, 0, len(hits))


def test_interval_is_that_of_drawing_rows():
    generator = np.random.default_rng(1)
    baseline, changed = generator.random(400) < 0.8, generator.random(400) < 0.75
    drawn = generator.integers(0, 400, (20_000, 400))
    low, high = np.quantile((baseline[drawn].mean(1) - changed[drawn].mean(1)), [0.025, 0.975])
    loss = paired_loss(baseline, changed)
    assert (loss.low, loss.high) == pytest.approx((low, high), abs=0.004)


@pytest.mark.parametrize(("worse", "better"), [(0.05, 0.02), (0.2, 0.2), (0.1, 0.0)])
def test_coverage(worse, better):
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(600):
        outcome = generator.random(300)
        loss = paired_loss(outcome < worse, (outcome >= worse) & (outcome < worse + better), num_resamples=2000, seed=seed)
        covered += loss.low <= worse - better <= loss.high
    assert 0.915 <= covered / 600 <= 0.98


def scores(tmp_path, name, rows):
    table = pa.table(
        {
            "source_file": pa.array([file for file, _, _ in rows], pa.string()),
            "source_row": pa.array([row for _, row, _ in rows], pa.int64()),
            "task": pa.nulls(len(rows), pa.string()),
            "hit": pa.array([hit for _, _, hit in rows], pa.bool_()),
        }
    )
    pq.write_table(table, tmp_path / name)
    return read_scores(tmp_path / name)


def test_rows_are_paired_by_source(tmp_path):
    first = scores(tmp_path, "a", [("x", 0, True), ("x", 1, True), ("y", 0, True), ("y", 1, None), ("z", 9, True)])
    # In another order; a row that is missing, one more, one without reference, one that was written twice.
    second = scores(
        tmp_path, "b", [("y", 1, True), ("y", 0, False), ("x", 1, False), ("x", 1, True), ("x", 0, None), ("q", 0, True)]
    )
    loss = loss_of(first, second)
    assert (loss.point, loss.num_rows) == (0.5, 2)
    assert loss_of(first, scores(tmp_path, "c", [("elsewhere", 0, True)])) is None
    assert loss_of(first, scores(tmp_path, "d", [])) is None


def test_unreadable_scores(tmp_path):
    (tmp_path / "torn").write_text("PAR1")
    pq.write_table(pa.table({"source_file": ["x"]}), tmp_path / "columns")
    for name in ("torn", "columns"):
        with pytest.raises(ConfigError, match=r"scores\.parquet cannot be read"):
            read_scores(tmp_path / name)


@settings(max_examples=examples(300))
@given(st.lists(st.tuples(VALUES, VALUES), max_size=12))
def test_front_is_what_nothing_dominates(points):
    def known(point):
        return all(value is not None and not math.isnan(value) for value in point)

    def dominates(a, b):
        return known(a) and a[0] >= b[0] and a[1] <= b[1] and (a[0] > b[0] or a[1] < b[1])

    expected = [known(point) and not any(dominates(other, point) for other in points) for point in points]
    assert pareto_front([q for q, _ in points], [c for _, c in points]) == expected


def row(label, quality, experts, speed, loss=None):
    metrics = {"exact_match": quality, "active_experts_after": experts, "tokens_per_s": speed}
    known = {name: value for name, value in metrics.items() if value is not None}
    policy = "none" if label == "unmodified" else "sere"
    return Row(label, policy, (), label, known, {}, {}, 0, "", loss=loss)


BASE = row("unmodified", 0.9, 40, 1000, Loss(0))


def test_fronts_of_rows():
    rows = with_fronts([BASE, row("a", 0.88, 20, 1200), row("b", 0.87, 15, 1100), row("c", 0.8, 30, None)])
    assert [r.pareto_active_experts for r in rows] == [True, True, True, False]
    assert [r.pareto_speed for r in rows] == [True, True, False, False]


def test_fastest_within_the_loss_is_recommended():
    safe = row("safe", 0.89, 30, 1200, Loss(0.01, 0.002, 0.018, 500))
    likely = row("likely", 0.885, 20, 1300, Loss(0.015, -0.01, 0.04, 500))
    bad = row("bad", 0.5, 10, 2000, Loss(0.4, 0.3, 0.5, 500))
    found = recommend([BASE, safe, likely, bad], by="speed", max_loss=0.02)
    assert (found.row, found.certainty) == (likely, "likely")
    assert "likely, the fastest (1300 tokens/s, +30%)" in found.text and "0.0150 (95% interval -0.0100 to 0.0400" in found.text
    assert "only the point estimate is within" in found.text and "safe would be safe (1200 tokens/s, +20%)" in found.text
    found = recommend([BASE, safe, bad], by="speed", max_loss=0.02)
    assert (found.row, found.certainty) == (safe, "safe") and "even the interval's upper end is within" in found.text
    unknown = row("unknown", 0.88, 20, 1400, Loss(0.9 - 0.88))
    found = recommend([BASE, safe, unknown], by="speed", max_loss=0.02)
    assert (found.row, found.certainty) == (unknown, "unknown"), "0.9 - 0.88 is within 0.02"
    assert recommend([BASE, safe, likely, bad], by="speed", max_loss=0.5).row is bad


def test_fewest_active_experts():
    few = row("few", 0.89, 20, 900, Loss(0.01, 0.0, 0.02, 500))
    fast = row("fast", 0.89, 30, 1300, Loss(0.01, 0.0, 0.02, 500))
    found = recommend([BASE, few, fast], by="active_experts", max_loss=0.02)
    assert found.row is few and "fewest active experts (20.0 active experts, -50%)" in found.text
    assert recommend([BASE, few, fast], by="speed", max_loss=0.02).row is fast


def test_ties_go_to_the_lower_loss():
    rows = [row(str(i), 0.89, 20, 1200, Loss(loss, loss, loss, 9)) for i, loss in enumerate((0.02, 0.01, 0.015))]
    assert recommend([BASE, *rows], by="speed", max_loss=0.02).row is rows[1]


def test_nothing_but_the_unmodified_model():
    bad = row("bad", 0.8, 10, 2000, Loss(0.1, 0.08, 0.12, 500))
    slow = row("slow", 0.9, 10, 900, Loss(0.0, 0.0, 0.0, 500))
    found = recommend([BASE, bad], by="speed", max_loss=0.02)
    assert found.row is BASE and "no configuration has a quality loss within 0.02; the least is 0.1000" in found.text
    found = recommend([BASE, bad, slow], by="speed", max_loss=0.02)
    assert found.row is BASE and "is faster" in found.text and found.certainty == "unmodified"
    found = recommend([BASE, row("wide", 0.9, 50, 2000, Loss(0.0))], by="active_experts", max_loss=0.02)
    assert found.row is BASE and "no configuration with a quality loss within 0.02 has fewer active experts" in found.text


def test_runs_that_cannot_tell():
    bad = row("bad", 0.8, 10, 2000)
    assert "no finished run of the unmodified model" in recommend([bad], by="speed", max_loss=0.02).text
    assert recommend([BASE], by="speed", max_loss=0.02).row is None
    slow = row("slow", 0.9, 10, None, Loss(0.0))
    assert "no other run has tokens_per_s" in recommend([BASE, slow], by="speed", max_loss=0.02).text
    assert recommend([BASE, slow], by="active_experts", max_loss=0.02).row is slow


def test_the_cheapest_of_many_is_not_safe_by_luck():
    """Each upper end is within; of forty such configurations one is so by chance."""
    rows = [row(str(i), 0.89, 20, 1200 + i, Loss(0.01, 0.0005, 0.0195, 500)) for i in range(40)]
    found = recommend([BASE, *rows], by="speed", max_loss=0.02)
    assert found.row is rows[-1] and found.certainty == "likely"
    assert "not the one for 40 configurations to choose from (Holm)" in found.text
    assert recommend([BASE, rows[-1]], by="speed", max_loss=0.02).certainty == "safe"


def test_few_false_claims_whatever_the_number_of_configurations():
    """None is within the limit, by a hair: any claim is false, and one time in forty there may be one."""
    generator = np.random.default_rng(0)
    claims = 0
    for _ in range(400):
        points = 0.02001 + 0.005 * generator.standard_normal(20)
        rows = [row(str(i), 0.9, 20, 2000, Loss(p, p - 0.0098, p + 0.0098, 500)) for i, p in enumerate(points)]
        claims += recommend([BASE, *rows], by="speed", max_loss=0.02).certainty == "safe"
    assert claims <= 20


def test_a_difference_in_speed_within_its_noise_is_none():
    def noisy(made, error):
        return dataclasses.replace(made, speed_error=error)

    fast = row("fast", 0.89, 30, 1030, Loss(0.006, 0.002, 0.010, 500))
    slow = row("slow", 0.89, 30, 1020, Loss(0.005, 0.001, 0.009, 500))
    base = noisy(BASE, 20)
    found = recommend([base, noisy(fast, 20), noisy(slow, 20)], by="speed", max_loss=0.02)
    assert found.row is base and "is faster" in found.text
    base = noisy(BASE, 2)
    assert recommend([base, noisy(fast, 2), noisy(slow, 2)], by="speed", max_loss=0.02).row.label == "fast"
    assert recommend([base, noisy(fast, 8), noisy(slow, 2)], by="speed", max_loss=0.02).row.label == "slow", "less loss"
    assert recommend([BASE, fast, slow], by="speed", max_loss=0.02).row is fast, "where no noise is known"


def test_runs_in_batches_of_several_sizes_are_left_out():
    good = row("good", 0.89, 30, 1200, Loss(0.01, 0.002, 0.015, 500))
    mixed = dataclasses.replace(row("mixed", 0.89, 20, 1500, Loss(0.01, 0.002, 0.015, 500)), params={"mixed_batch": "True"})
    assert recommend([BASE, good, mixed], by="speed", max_loss=0.02).row is good
