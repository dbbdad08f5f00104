"""Comparison of runs in a real MLflow store."""

import csv
import io

import mlflow
import pytest
from rich.console import Console

from calibration_jobs.tracking import track
from conf.schema import ConfigError, EngineConfig, GenerateConfig, RerouteConfig, TrackingConfig
from pipeline.report import compare

BASE = dict(active_experts_before=40.0, critical_share=0.0, tokens_per_s=1000.0, mean_generated_tokens=9.0)


@pytest.fixture
def store(tmp_path):
    yield TrackingConfig(uri=f"sqlite:///{tmp_path}/ml.db", experiment="e")
    mlflow.set_tracking_uri(None)


def record(store, reroute, metrics, *, max_num_seqs=16):
    engine = EngineConfig(max_num_seqs=max_num_seqs)
    config = GenerateConfig(model="m", data="d", output="o", reroute=reroute, engine=engine, tracking=store)
    with track(store, kind="generate", default_name="n") as tracker:
        tracker.log_config(config)
        tracker.log_params({})
        tracker.log_metrics({**BASE, **metrics})


def show(store, tmp_path):
    console = Console(width=120, record=True, file=io.StringIO())
    return compare("e", uri=store.uri, output=str(tmp_path / "out"), console=console), console.export_text()


def test_table_csv_and_picture(store, tmp_path):
    sere = RerouteConfig(policy="sere", similarity="x", threshold=0.25)
    record(store, sere, {"exact_match": 0.1, "active_experts_after": 1.0})
    record(store, sere, {"exact_match": 0.8, "exact_match/add": 0.7, "active_experts_after": 20.0, "rerouted_share": 0.4})
    record(store, RerouteConfig(policy="none"), {"exact_match": 0.9, "exact_match/add": 1.0, "active_experts_after": 40.0})
    rows, text = show(store, tmp_path)
    assert [row.label for row in rows] == ["unmodified", "sere S=2, cosine rho=0.25"], "the latest run of a configuration"
    assert "0.800 (-0.100)" in text and "20.0 (-20.0)" in text and "40.0%" in text
    assert "add" in text and "0.70" in text
    with (tmp_path / "out" / "compare.csv").open() as opened:
        baseline, changed = csv.DictReader(opened)
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
