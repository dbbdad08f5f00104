"""Comparison of runs in a real MLflow store."""

import csv
import io

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from sere.conf.errors import ConfigError
from sere.conf.schema import EngineConfig, GenerateConfig, RerouteConfig, TrackingConfig
from sere.pipeline.cli import main
from sere.pipeline.compare.report import compare
from sere.pipeline.tracking import tracker as tracker_module
from sere.pipeline.tracking.circumstances import circumstances
from sere.pipeline.tracking.tracker import track

BASE = dict(active_experts_before=40.0, critical_share=0.0, tokens_per_s=1000.0, mean_generated_tokens=9.0)


@pytest.fixture
def store(tmp_path):
    yield TrackingConfig(uri=f"sqlite:///{tmp_path}/ml.db", experiment="e")
    mlflow.set_tracking_uri(None)


def record(store, reroute, metrics, *, max_num_seqs=16, hits=None, folder=None, **params):
    engine = EngineConfig(max_num_seqs=max_num_seqs)
    config = GenerateConfig(model="m", data="d", output="o", reroute=reroute, engine=engine, tracking=store)
    with track(store, kind="generate", default_name="n") as tracker:
        tracker.log_config(config)
        tracker.log_params(params)
        tracker.log_metrics({**BASE, **metrics})
        if hits is not None:
            keys = {"source_file": ["f"] * len(hits), "source_row": range(len(hits)), "task": [None] * len(hits)}
            pq.write_table(pa.table({**keys, "hit": hits}), folder / "scores.parquet")
            tracker.log_file(folder / "scores.parquet")


def show(store, tmp_path, **settings):
    console = Console(width=140, record=True, file=io.StringIO())
    return compare("e", uri=store.uri, output=str(tmp_path / "out"), console=console, **settings), console.export_text()


def table_of(tmp_path):
    with (tmp_path / "out" / "compare.csv").open() as opened:
        return list(csv.DictReader(opened))


def test_table_csv_and_picture(store, tmp_path):
    sere = RerouteConfig(policy="sere", similarity="x", threshold=0.25)
    record(store, sere, {"exact_match": 0.1, "active_experts_after": 1.0})
    record(store, sere, {"exact_match": 0.8, "exact_match/add": 0.7, "active_experts_after": 20.0, "rerouted_share": 0.4})
    record(store, RerouteConfig(policy="none"), {"exact_match": 0.9, "exact_match/add": 1.0, "active_experts_after": 40.0})
    rows, text = show(store, tmp_path)
    assert [row.label for row in rows] == ["unmodified", "sere S=2, cosine rho=0.25"], "the latest run of a configuration"
    assert "0.800 (-0.100)" in text and "20.0 (-20.0)" in text and "40.0%" in text
    assert "add" in text and "0.70" in text
    baseline, changed = table_of(tmp_path)
    assert float(changed["difference_exact_match"]) == pytest.approx(-0.1)
    assert float(changed["exact_match/add"]) == 0.7 and baseline["difference_exact_match"] == ""
    assert (tmp_path / "out" / "compare.png").stat().st_size > 5000


def test_other_batches_are_not_compared(store, tmp_path):
    record(store, RerouteConfig(policy="none"), {"exact_match": 0.9, "active_experts_after": 40.0})
    random = RerouteConfig(policy="random")
    record(store, random, {"exact_match": 0.8, "active_experts_after": 20.0}, max_num_seqs=4)
    _, text = show(store, tmp_path)
    assert "0.800 (" not in text and "batch" in text


def test_without_references_or_counters(store, tmp_path):
    record(store, None, {})
    rows, text = show(store, tmp_path)
    assert rows[0].label == "unmodified" and "1000" in text
    assert not (tmp_path / "out" / "compare.png").exists()


def test_nothing_to_compare(store, tmp_path):
    with track(store, kind="calibrate", default_name="n"):
        pass
    with pytest.raises(ConfigError, match="no finished run"):
        show(store, tmp_path)


def test_every_setting_that_differs_is_a_configuration_of_its_own(store, tmp_path):
    metrics = {"exact_match": 0.8, "active_experts_after": 20.0}
    for similarity, min_tokens in (("a", 4), ("a", 8), ("b", 4)):
        record(store, RerouteConfig(policy="sere", similarity=similarity, min_tokens=min_tokens), metrics)
    rows, _ = show(store, tmp_path)
    assert [row.label.split("rho=0.5, ")[1] for row in rows] == ["a", "a, min_tokens=8", "b"]


def test_interval_front_and_recommendation(store, tmp_path):
    """From the rows' scores; a run without them is compared by its exact match."""
    right = [True] * 90 + [False] * 10
    sere = RerouteConfig(policy="sere", similarity="x")
    record(store, None, {"exact_match": 0.9, "active_experts_after": 40.0}, hits=right, folder=tmp_path)
    one_lost = {"exact_match": 0.89, "active_experts_after": 20.0, "tokens_per_s": 1500.0}
    record(store, sere, one_lost, hits=[False, *right[1:]], folder=tmp_path)
    record(store, RerouteConfig(policy="random"), {"exact_match": 0.7, "active_experts_after": 20.0, "tokens_per_s": 1400.0})
    _, text = show(store, tmp_path)
    baseline, changed, random = table_of(tmp_path)
    assert [baseline[name] for name in ("loss", "pareto_active_experts", "pareto_speed", "recommended")] == [
        "",
        "True",
        "True",
        "False",
    ]
    assert float(changed["loss"]) == 0.01 and float(changed["loss_low"]) == 0 and 0.02 <= float(changed["loss_high"]) <= 0.04
    assert changed["recommended"] == "True" and changed["pareto_speed"] == "True"
    assert float(random["loss"]) == pytest.approx(0.2) and random["loss_low"] == "" and random["pareto_speed"] == "False"
    assert ">*+" in text and "+0.000..+0.030" in text
    assert "Recommended: sere S=2, cosine rho=0.5, the fastest (1500 tokens/s, +50%) with a quality loss within 0.02" in text
    assert (
        "likely: only the point estimate" in text and "even the interval's upper end" in show(store, tmp_path, max_loss=0.1)[1]
    )
    assert show(store, tmp_path, by="active_experts")[0][1].recommended
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


def test_scores_that_cannot_be_read(store, tmp_path):
    metrics = {"exact_match": 0.9, "active_experts_after": 40.0}
    record(store, None, metrics, hits=[True, False], folder=tmp_path)
    random = RerouteConfig(policy="random")
    record(store, random, metrics, hits=["no", "scores"], folder=tmp_path)
    rows, text = show(store, tmp_path)
    assert rows[1].loss.point == 0 and rows[1].loss.low is None
    assert "Note: random S=2: no interval of the loss, as scores.parquet cannot be read" in text


def test_other_data_of_the_same_name_is_not_compared(store, tmp_path):
    for digest, reroute in (("a", None), ("b", RerouteConfig(policy="random"))):
        config = GenerateConfig(model="m", data="d", output="o", reroute=reroute, tracking=store)
        with track(store, kind="generate", default_name="n") as tracker:
            tracker.log_config(config)
            tracker.log_dataset(source="d", digest=digest, num_rows=1, context="generation")
            tracker.log_metrics({**BASE, "exact_match": 0.5})
    _, text = show(store, tmp_path)
    assert "data_digest b: No recommendation" in text and "0.500 (" not in text


def test_arguments(store, tmp_path):
    record(store, None, {})
    for settings in ({"max_loss": -0.1}, {"max_loss": float("nan")}, {"by": "colour"}):
        with pytest.raises(ConfigError, match="--"):
            show(store, tmp_path, **settings)
    assert main(["compare", "e", "--uri", store.uri, "--output", str(tmp_path / "o"), "--max-loss", "2"]) == 2
    assert main(["compare", "e", "--uri", store.uri, "--output", str(tmp_path / "o"), "--by", "active_experts"]) == 0
    assert {file.name for file in (tmp_path / "o").iterdir()} == {"compare.csv", "report.html"}


def test_other_devices_and_versions_are_not_compared(store, tmp_path, monkeypatch):
    record(store, RerouteConfig(policy="none"), {"exact_match": 0.9, "active_experts_after": 40.0})
    known = circumstances()
    for name in ("device", "versions.vllm", "versions.torch", "versions.sere"):
        monkeypatch.setattr(tracker_module, "circumstances", lambda name=name: {**known, name: "another"})
        record(store, RerouteConfig(policy="random"), {"exact_match": 0.8, "active_experts_after": 20.0})
    rows, text = show(store, tmp_path)
    assert len(rows) == 5 and "0.800 (" not in text and all(row.loss is None for row in rows[1:])
    assert "vllm another" in " ".join(text.split())


def test_an_alias_that_moved_is_two_configurations(store, tmp_path):
    record(store, RerouteConfig(policy="none"), {"exact_match": 0.9, "active_experts_after": 40.0})
    sere = RerouteConfig(policy="sere", similarity="models:/m@candidate")
    for number in (1, 2):
        known = {"similarity_version": f"models:/m/{number}", "similarity_digest": f"{number}" * 64}
        record(store, sere, {"exact_match": 0.8, "active_experts_after": 20.0}, **known)
    rows, _ = show(store, tmp_path)
    assert [row.label.rpartition(", ")[2] for row in rows[1:]] == ["models:/m/1 (11111111)", "models:/m/2 (22222222)"]


def test_mixed_batches_and_many_tasks_are_told(store, tmp_path, caplog):
    tasks = {f"exact_match/t{number:04d}": 0.5 for number in range(300)}
    record(store, RerouteConfig(policy="none"), {"exact_match": 0.9, "active_experts_after": 40.0, **tasks})
    assert "300 tasks: exact match of the first 200" in caplog.text
    random = RerouteConfig(policy="random")
    record(store, random, {"exact_match": 0.9, "active_experts_after": 20.0, "tokens_per_s": 2000.0}, mixed_batch="true")
    rows, text = show(store, tmp_path)
    assert len(rows[0].by_task) == 200 and "24 of 200 tasks" in " ".join(text.split())
    assert "~ decoded in batches of several sizes" in " ".join(text.split()) and not any(row.recommended for row in rows[1:])
