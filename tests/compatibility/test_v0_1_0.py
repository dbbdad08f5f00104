"""What was made with version 0.1.0 still opens: an artifact, two jobs begun, MLflow runs, the plugin's settings.

The files in `v0_1_0` were written by that version, from the repository's root:

    sere calibrate conf/calibrate.yaml output=OUT/artifact/similarity.safetensors metrics=[cosine] num_sequences=24 \
        domain_column=null judge.held_out_rows=8 judge.batch_sizes=[8] judge.reference_batch_size=8 judge.primary_top_k=[2] \
        judge.emulate_batch_sizes=[8] shard_rows=8
    sere generate conf/generate.yaml output=OUT/run num_rows=48 checkpoint_rows=16 preserve_order=false \
        reroute.similarity=OUT/artifact/similarity.safetensors
    sere generate conf/generate.yaml output=OUT/none num_rows=48 reroute.policy=none

Of each job's folder only what a kill half way would have left is kept.
"""

import gzip
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from sere.calibration_jobs.job import calibrate
from sere.conf.load import load_config
from sere.conf.schema import CalibrateConfig, GenerateConfig
from sere.ops.model_digest import model_identity
from sere.ops.similarity import SimilarityArtifact
from sere.pipeline.compare.report import compare
from sere.pipeline.generate.driver import generate
from sere.pipeline.tracking.registry import alias_version
from sere.pipeline.tracking.runs import read_runs
from tests.conftest import DEMO_MODEL, ROOT

MADE = Path(__file__).parent / "v0_1_0"


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """The jobs name model and data by paths relative to it."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def store(tmp_path):
    """The URI of the MLflow store."""
    (tmp_path / "mlflow.db").write_bytes(gzip.decompress((MADE / "mlflow.db.gz").read_bytes()))
    yield f"sqlite:///{tmp_path}/mlflow.db"
    import mlflow

    mlflow.set_tracking_uri(None)


@pytest.fixture
def own_ray():
    """The Ray that the job starts is gone after the test."""
    import ray

    yield
    ray.shutdown()


def test_artifact():
    artifact = SimilarityArtifact.load(MADE / "similarity.safetensors")
    assert artifact.layers == [0, 1, 2, 3] and artifact.metrics == ["cosine"]
    artifact.check_model(num_experts=64, model=model_identity(DEMO_MODEL))


def test_mlflow_runs(store, tmp_path):
    assert {run["params"]["reroute.policy"] for run in read_runs(store, "sere-demo")} == {"sere", "none"}
    assert alias_version(store, "sere-demo-moe", "candidate") == "1"
    rows = compare("sere-demo", uri=store, output=str(tmp_path / "report"), console=Console(quiet=True))
    assert [row.label for row in rows] == ["unmodified", "sere S=2, cosine rho=0"]
    assert rows[0].group == rows[1].group, "comparable"


@pytest.mark.cluster
@pytest.mark.usefixtures("own_ray")
def test_a_calibration_job_begun_goes_on(tmp_path):
    shutil.copytree(MADE / "calibration", tmp_path / "calibration")
    overrides = [
        f"output={tmp_path}/similarity.safetensors", "metrics=[cosine]", "num_sequences=24", "domain_column=null",
        "shard_rows=8", "judge.held_out_rows=8", "judge.batch_sizes=[8]", "judge.reference_batch_size=8",
        "judge.primary_top_k=[2]", "judge.emulate_batch_sizes=[8]", "tracking.uri=",
    ]  # fmt: skip
    done = calibrate(load_config(CalibrateConfig, "conf/calibrate.yaml", overrides))
    assert done.num_done == 3, "the other shard, and two tasks that judge"
    before, now = SimilarityArtifact.load(MADE / "similarity.safetensors"), SimilarityArtifact.load(done.file)
    assert all(torch.equal(matrix, now.matrices[key]) for key, matrix in before.matrices.items())


@pytest.mark.engine
@pytest.mark.usefixtures("own_ray")
def test_a_generate_job_begun_goes_on(tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    shutil.copytree(MADE / "run", tmp_path / "run")
    overrides = [
        f"output={tmp_path}/run", "num_rows=48", "preserve_order=false", "tracking.uri=",
        # What conf/generate.yaml said then.
        f"reroute.similarity={MADE}/similarity.safetensors", "reroute.policy=sere", "reroute.primary_top_k=2",
    ]  # fmt: skip
    summary = generate(load_config(GenerateConfig, "conf/generate.yaml", overrides))
    assert summary.metrics["num_rows"] == 48 and summary.metrics["num_sessions"] == 2
    # Small files have become one, with a column more.
    answers = {
        (row["source_file"], row["source_row"]): row
        for file in (tmp_path / "run" / "results").iterdir()
        for row in pq.read_table(file).to_pylist()
    }
    assert all(row.pop("exact_match") in (True, False) for row in answers.values())
    for file in (MADE / "run" / "results").iterdir():
        for row in pq.read_table(file).to_pylist():
            assert answers.pop((row["source_file"], row["source_row"])) == row
    assert len(answers) == 24, "only what was missing"
