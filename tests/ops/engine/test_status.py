"""`assert_rerouting` on engines of other processes, in a folder whose modules have our folders' names."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from sere.ops.engine import assert_rerouting
from sere.ops.engine.counters import read_counters
from tests.conftest import DEMO_MODEL
from tests.ops.engine.engines import PROMPTS

pytestmark = pytest.mark.engine

SCRIPT = """
    import json, sys
    import conf, ops, pipeline

    if __name__ == "__main__":
        assert conf.OURS and ops.OURS and pipeline.OURS
        from vllm import LLM, SamplingParams
        from sere.ops.engine import assert_rerouting

        model, stats_dir, prompts = json.loads(sys.argv[1])
        llm = LLM(
            model=model, dtype="float32", tensor_parallel_size=2, max_num_seqs=16, enforce_eager=True,
            kv_cache_memory_bytes=1 << 27, disable_log_stats=True,
            additional_config={"sere": {"policy": "random", "primary_top_k": 1, "stats_dir": stats_dir}},
        )
        assert_rerouting(llm)
        assert_rerouting(llm.llm_engine)
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
        print("done")
"""


def test_worker_processes_re_route_in_a_folder_with_modules_of_the_same_names(tmp_path):
    """The script's folder comes first in `sys.path`, in the engine's processes too."""
    (tmp_path / "ops").mkdir()
    for file in ("conf.py", "ops/__init__.py", "pipeline.py"):
        (tmp_path / file).write_text("OURS = True\n")
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    arguments = json.dumps([str(DEMO_MODEL), str(tmp_path / "stats"), PROMPTS])
    command = [sys.executable, "script.py", arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "done" in result.stdout, (result.stdout + result.stderr)[-5000:]
    counters = read_counters(tmp_path / "stats")
    assert [layer.layer for layer in counters] == [0, 1, 2, 3]
    for layer in counters:
        # The ranks route the same rows: one of them counts. The first token of an answer comes from its prompt.
        assert layer.counts["decode_rows"] == 7 * len(PROMPTS)
        assert layer.counts["rerouted_slots"] > 0


class Answering:
    """An engine whose workers answer so, or raise."""

    def __init__(self, *answers):
        self._answers = answers

    def collective_rpc(self, method):
        if isinstance(self._answers[0], Exception):
            raise self._answers[0]
        return list(self._answers)


MISSING = [
    NotImplementedError("Method 'sere_status' is not implemented."),
    Exception("Call to collective_rpc method failed: Method 'sere_status' is not implemented."),
    Exception(
        "Call to collective_rpc method failed: Worker failed with error ''CPUWorker' object has no attribute 'sere_status''"
    ),
]


@pytest.mark.parametrize("error", MISSING, ids=["one process", "engine process", "worker processes"])
def test_workers_without_the_plugin(error):
    with pytest.raises(RuntimeError, match="did not load the vLLM plugin sere: unset VLLM_PLUGINS or name sere in it"):
        assert_rerouting(Answering(error))


def test_every_worker_counts():
    on, stage_without_experts = {"policy": "sere", "num_layers": 4}, {"policy": "sere", "num_layers": 0}
    off = {"policy": None, "num_layers": 0}
    assert_rerouting(Answering(on, on))
    assert_rerouting(Answering(stage_without_experts, on))
    with pytest.raises(RuntimeError, match="without a `sere` section"):
        assert_rerouting(Answering(on, off))
    with pytest.raises(RuntimeError, match="no worker of this engine has a MoE layer"):
        assert_rerouting(Answering(stage_without_experts))


def test_a_dead_engine_is_not_one_without_the_plugin():
    with pytest.raises(OSError, match="engine is dead"):
        assert_rerouting(Answering(OSError("the engine is dead")))
