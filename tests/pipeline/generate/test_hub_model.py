"""`sere generate` of a model of the hub, with a real engine, which gets the driver's commit and checks the artifact by it."""

import json
import os
import subprocess
import sys

import pytest

from sere.ops.similarity import SimilarityArtifact
from tests.conftest import DEMO_MODEL, ROOT
from tests.hub_server import hub_server

pytestmark = [pytest.mark.engine, pytest.mark.long]
NAME = "somebody/demo-moe"


def test_a_run_begun_before_the_download_is_the_same_after_it(demo_artifact, tmp_path):
    def sere(*overrides: str, status: int = 0, **variables: str) -> str:
        settings = [
            f"model={NAME}", f"output={tmp_path}/run", "num_rows=16", "tracking.uri=", "reroute.policy=sere",
            f"reroute.similarity={tmp_path}/similarity.safetensors",
        ]  # fmt: skip
        command = [sys.executable, "-m", "sere.pipeline.cli", "generate", "conf/generate.yaml", *settings, *overrides]
        left_out = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL")
        inherited = {name: value for name, value in os.environ.items() if name not in left_out}
        environment = inherited | hub.environment(tmp_path / "home") | variables
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stdout[-3000:] + done.stderr[-6000:]
        return done.stdout if status == 0 else done.stderr.splitlines()[-1]

    with hub_server() as hub:
        commit = hub.commit(NAME, DEMO_MODEL)
        whole = SimilarityArtifact.load(demo_artifact)
        # By its commit alone: the digest would not do.
        model = {"name": NAME, "digest": "0" * 64, "commit": commit}
        artifact = SimilarityArtifact(whole.matrices, {**whole.manifest, "model": model})
        artifact.save(tmp_path / "similarity.safetensors")
        sere()
        job = json.loads((tmp_path / "run" / "job.json").read_text())
        assert job["settings"]["model_digest"] == f"commit:{commit}"
        assert any(request.endswith(f"/resolve/{commit}/model.safetensors") for request in hub.requests)
        assert all("/resolve/main/" not in request for request in hub.requests), "everybody asks for the commit"

        assert (tmp_path / "run" / "manifest.json").is_file()
        sere(HF_HUB_OFFLINE="1")
        moved = hub.commit(NAME, DEMO_MODEL)
        error = sere("reroute=null", status=2)
        assert f"model_digest was 'commit:{commit}', is 'commit:{moved}'" in error and "model_revision=COMMIT" in error
        assert "computed from other weights" in sere("model_revision=main", "overwrite=true", status=2)
        sere(f"model_revision={commit}")
