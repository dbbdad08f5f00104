"""Shared by all tests: the bundled model, an artifact for it, and a quiet environment."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

# Before anything imports vLLM or Ray: engines in this process, so that tests can look inside; nothing leaves the machine.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    RAY_USAGE_STATS_ENABLED="0",
    MLFLOW_DISABLE_TELEMETRY="true",
    HF_HUB_OFFLINE="1",
)

import pytest
from hypothesis import HealthCheck, settings

from tests.examples import FACTOR
from tests.servers import free_port, wait_until_listening

# The same cases in every run, so that what is red is the change; `make test-long` draws others, and more.
# On a busy machine drawing is slow, too: that is no fault of a test's.
settings.register_profile(
    "sere", derandomize=FACTOR == 1, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("sere")

# Shells ignore Ctrl-C in what they start in the background, and so would the processes that tests send it to.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "assets" / "demo-moe"


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return DEMO_MODEL


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory) -> Path:
    """A valid artifact of the demo model with drawn matrices: re-routing to anything in them shows."""
    import torch

    from sere.ops.model_digest import model_digest
    from sere.ops.similarity import SimilarityArtifact

    generator = torch.Generator().manual_seed(0)
    matrices = {}
    for layer in range(4):
        values = torch.rand(64, 64, generator=generator)
        matrices[layer, "cosine"] = torch.maximum(values, values.T).fill_diagonal_(1)
    model = {"name": "demo", "digest": model_digest(DEMO_MODEL)}
    manifest = {"num_experts": 64, "layers": [0, 1, 2, 3], "metrics": ["cosine"], "model": model}
    folder = tmp_path_factory.mktemp("artifact")
    return SimilarityArtifact(matrices, manifest).save(folder / "similarity.safetensors")


@pytest.fixture(scope="session")
def s3_bucket():
    """The URI of a bucket of a real S3 server on this machine; address and keys are in the environment.

    The server is another process: it loads Flask, whose proxies vLLM trips over when it looks through all loaded modules.
    """
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    if importlib.util.find_spec("moto") is None:
        pytest.skip("moto is not installed")
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            patch.setenv("AWS_ACCESS_KEY_ID", "id")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            wait_until_listening(server, port)
            import fsspec

            fsspec.filesystem("s3").mkdir("runs")
            yield "s3://runs"
    finally:
        server.kill()
        server.wait()
