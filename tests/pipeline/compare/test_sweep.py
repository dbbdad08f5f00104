"""A grid of configurations; and a small one for real, with its run directories on S3."""

import json
import os
import subprocess
import sys

import mlflow
import pyarrow.parquet as pq
import pytest

from sere.conf.errors import ConfigError
from sere.conf.load import load_config
from sere.conf.schema import SweepConfig
from sere.pipeline.compare.sweep import expand
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def points(*overrides):
    return expand(load_config(SweepConfig, "conf/sweep.yaml", overrides))


def test_grid():
    found = {point.name: point.config for point in points()}
    assert next(iter(found)) == "none,max_num_seqs=16", "what the others are compared with"
    # sere: 2 S x 2 thresholds; sere_t, oea and top_k know no threshold.
    assert len(found) == 1 + 4 + 2 + 2 + 2
    config = found["sere,S1,cosine,rho0.5,max_num_seqs=16"]
    assert (config.reroute.policy, config.reroute.primary_top_k, config.reroute.threshold) == ("sere", 1, 0.5)
    assert config.output == "runs/demo-moe/sweep/sere,S1,cosine,rho0.5,max_num_seqs=16"
    assert len({config.output for config in found.values()}) == len(found)


def test_each_batch_size_has_its_own_baseline():
    names = [point.name for point in points("grid.engine.max_num_seqs=[4,16]", "grid.reroute.policy=[sere]")]
    assert [name for name in names if name.startswith("none")] == ["none,max_num_seqs=4", "none,max_num_seqs=16"]


def test_overridden_rules_keep_what_they_look_at_and_the_baseline_has_none():
    grid = ["grid.reroute.policy=[top_k]", "grid.reroute.targets=[{rule: similar}]", "grid.reroute.primary_top_k=[1]"]
    found = {point.config.reroute.threshold for point in points(*grid) if point.config.reroute.policy == "top_k"}
    assert found == {0.0, 0.5}
    (baseline,) = [point.config for point in points(*grid) if point.config.reroute.policy == "none"]
    assert not baseline.reroute.rules().changes_routing(8)


def test_overrides_reach_every_run():
    found = points("overrides.num_rows=7", "overrides.engine.engine_kwargs={seed: 3}")
    assert all(point.config.num_rows == 7 and point.config.engine.engine_kwargs == {"seed": 3} for point in found)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("grid.reroute.primary_top_k=2", "must be a list of values, got 2"),
        ("grid.reroute.primary_top_k=[0]", "primary_top_k must be at least 1"),
        ("grid.reroute.primary_topk=[1]", "did you mean 'primary_top_k'"),
        ("grid.output=[a]", "grid must not name output"),
        ("by=size", "by"),
        ("max_loss=2", "max_loss must be between 0 and 1"),
    ],
)
def test_a_wrong_setting_is_found_before_anything_runs(override, words):
    with pytest.raises(ConfigError, match=words):
        points(override)


def test_a_report_without_a_place_is_found_before_anything_runs(tmp_path):
    (tmp_path / "report").write_text("a file")
    file = tmp_path / "sweep.yaml"
    file.write_text("base: conf/generate.yaml\ngrid: {reroute.policy: [sere]}\n")
    printed = sere("sweep", str(file), f"output={tmp_path}/runs", f"report={tmp_path}/report", status=2)
    assert "report cannot be written" in printed and "Traceback" not in printed and not (tmp_path / "runs").exists()


def sere(*arguments, status=0):
    environment = {k: v for k, v in os.environ.items() if k not in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL")}
    command = [sys.executable, "-m", "sere.pipeline.cli", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == status, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout + result.stderr


@pytest.mark.engine
def test_a_sweep_on_s3(s3_bucket, demo_artifact, tmp_path):
    """Input, run directories and logs on an S3 server; then the same command again, and another one."""
    import fsspec

    storage = fsspec.filesystem("s3")
    rows = pq.read_table(ROOT / "assets" / "evaluation.parquet").to_pylist()[:50]
    lines = [{"question": row["prompt"], "reference": row["reference"], "task": row["task"]} for row in rows]
    lines[7]["question"] = "x" * 300
    storage.pipe_file("runs/data/a.jsonl", "\n".join(json.dumps(line) for line in lines[:30]).encode())
    storage.pipe_file("runs/data/b.jsonl", ("\n".join(json.dumps(line) for line in lines[30:]) + "\n{broken").encode())
    file = tmp_path / "sweep.yaml"
    file.write_text("base: conf/generate.yaml\ngrid: {reroute.policy: [sere], reroute.primary_top_k: [2]}\n")
    settings = [
        str(file),
        f"output={s3_bucket}/sweep",
        f"report={tmp_path}/report",
        f"tracking.uri=sqlite:///{tmp_path}/ml.db",
        "tracking.experiment=sere-sweep",
        f"overrides.data={s3_bucket}/data/*.jsonl",
        "overrides.template='{{ question }}'",
        f"overrides.reroute.similarity={demo_artifact}",
    ]
    printed = sere("sweep", *settings)
    assert "Recommended: " in printed or "No recommendation" in printed
    assert "hunter2" not in printed
    for name in ("none", "sere,S2"):
        with storage.open(
            f"runs/sweep/{name}/results/" + storage.ls(f"runs/sweep/{name}/results")[0].rsplit("/", 1)[-1]
        ) as file:
            found = pq.read_table(file).to_pylist()
        places = [(row["source_file"], row["source_row"]) for row in found]
        assert places == [("a.jsonl", n) for n in range(30)] + [("b.jsonl", n) for n in range(21)], "in the input's order"
        assert [row["id"] for row in found[:1]] == ["a.jsonl#0"] and found[0]["question"] == rows[0]["prompt"]
        bad = {row["source_row"]: row["error"] for row in found if row["error"]}
        assert list(bad) == [7, 20] and "context length" in bad[7] and "line 21 is not a JSON object" in bad[20]
        with storage.open(f"runs/sweep/{name}/errors.parquet") as file:
            assert pq.read_table(file)["error"].to_pylist() == list(bad.values())
        assert storage.ls(f"runs/sweep/{name}/logs")
        assert b"hunter2" not in storage.cat_file(f"runs/sweep/{name}/job.json")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "sere S=2" in page

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/ml.db")
    try:
        runs = mlflow.search_runs(experiment_names=["sere-sweep"], output_format="list")
    finally:
        mlflow.set_tracking_uri(None)
    (parent,) = [run for run in runs if run.data.tags["sere.kind"] == "sweep"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.info.run_name for run in children} == {"none", "sere,S2"} and len(runs) == 3
    assert all(run.data.metrics["num_errors"] == 2 for run in children)

    again = sere("sweep", *settings)
    assert again.count("Finished before") == 2
    refused = sere("sweep", *settings, "overrides.sampling.max_tokens=3", status=2)
    assert "sampling.max_tokens was 48, is 3" in refused and "2 of 2 configurations failed" in refused
