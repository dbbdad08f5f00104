"""`sere generate` of a model or a dataset of the hub, with a real engine: all get the driver's commit."""

import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from sere.ops.similarity import SimilarityArtifact
from tests.conftest import DEMO_MODEL, ROOT
from tests.hub_server import hub_server

pytestmark = [pytest.mark.engine, pytest.mark.long]
NAME = "somebody/demo-moe"


DATA = "somebody/prompts"


@pytest.fixture
def hub():
    with hub_server() as started:
        yield started


@pytest.fixture
def sere(hub, tmp_path):
    """A function that runs `sere generate` with this hub; returns what it printed, or the last line of its error."""

    def run(*overrides: str, status: int = 0, **variables: str) -> str:
        settings = [f"output={tmp_path}/run", "num_rows=16", "tracking.uri="]
        command = [sys.executable, "-m", "sere.pipeline.cli", "generate", "conf/generate.yaml", *settings, *overrides]
        left_out = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL")
        inherited = {name: value for name, value in os.environ.items() if name not in left_out}
        environment = inherited | hub.environment(tmp_path / "home") | variables
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stdout[-3000:] + done.stderr[-6000:]
        return done.stdout if status == 0 else done.stderr.splitlines()[-1]

    return run


def test_a_run_begun_before_the_download_is_the_same_after_it(hub, sere, demo_artifact, tmp_path):
    model = [f"model={NAME}", "reroute.policy=sere", f"reroute.similarity={tmp_path}/similarity.safetensors"]
    commit = hub.commit(NAME, DEMO_MODEL)
    whole = SimilarityArtifact.load(demo_artifact)
    # By its commit alone: the digest would not do.
    known = {"name": NAME, "digest": "0" * 64, "commit": commit}
    artifact = SimilarityArtifact(whole.matrices, {**whole.manifest, "model": known})
    artifact.save(tmp_path / "similarity.safetensors")
    sere(*model)
    job = json.loads((tmp_path / "run" / "job.json").read_text())
    assert job["settings"]["model_digest"] == f"commit:{commit}"
    assert any(request.endswith(f"/resolve/{commit}/model.safetensors") for request in hub.requests)
    assert all("/resolve/main/" not in request for request in hub.requests), "everybody asks for the commit"

    assert (tmp_path / "run" / "manifest.json").is_file()
    sere(*model, HF_HUB_OFFLINE="1")
    moved = hub.commit(NAME, DEMO_MODEL)
    error = sere(*model, "reroute=null", status=2)
    assert f"model_digest was 'commit:{commit}', is 'commit:{moved}'" in error and "model_revision=COMMIT" in error
    assert "computed from other weights" in sere(*model, "model_revision=main", "overwrite=true", status=2)
    sere(*model, f"model_revision={commit}")


def test_a_job_reads_the_rows_of_the_commit_it_was_begun_with(hub, sere, tmp_path):
    def put(answer: int) -> str:
        folder = tmp_path / f"prompts-{answer}"
        folder.mkdir()
        (folder / "train.jsonl").write_text("\n".join(json.dumps({"prompt": f"add {n}+{answer}="}) for n in range(16)))
        return hub.commit(f"datasets/{DATA}", folder)

    data = [f"data={DATA}", "reroute=null"]
    commit = put(1)
    sere(*data)
    rows = pq.read_table(tmp_path / "run" / "results").to_pylist()
    assert [row["prompt"] for row in rows] == [f"add {n}+1=" for n in range(16)] and rows[0]["source_file"] == "train"
    job = json.loads((tmp_path / "run" / "job.json").read_text())
    assert job["settings"]["data/train"].endswith(f"commit={commit}") and "data_revision" not in job["settings"]
    assert "Finished before" in sere(*data, HF_HUB_OFFLINE="1")
    moved = put(2)
    error = sere(*data, status=2)
    assert f"commit={commit}" in error and f"commit={moved}" in error and "data_revision=COMMIT" in error
    assert "Finished before" in sere(*data, f"data_revision={commit}")
