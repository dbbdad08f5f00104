"""Memory: a model bigger than its budget is calibrated within it, and more tokens do not need more."""

import json
import subprocess
import sys

import pytest
import torch
import transformers

from tests.conftest import ROOT

pytestmark = pytest.mark.slow
NUM_LAYERS = 24
# Runs a real worker in a process of its own and prints what it held at most beyond what it had after its imports:
# anonymous memory, since pages of a mapped checkpoint can be dropped at any time.
SCRIPT = """
import json, sys, threading, time
import torch
import sere.calibration_jobs.metrics
list(sere.calibration_jobs.metrics.METRIC_CLASSES.values())
import transformers.models.qwen3_moe.modeling_qwen3_moe
from sere.calibration_jobs.shards import TokenRow
from sere.calibration_jobs.workers.worker import CalibrationWorker
from sere.conf.schema import CalibrateConfig, JudgeConfig

def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

folder, max_memory_gib, num_rows, *rest = json.loads(sys.argv[1])
config = CalibrateConfig(
    model=folder, data="d", output="o", max_memory_gib=max_memory_gib, batch_size=8, judge=JudgeConfig(held_out_rows=0)
)
torch.set_num_threads(1)
worker = CalibrationWorker(config, 64)
before = peak = anonymous()
done = False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
worker.ready()
rows = [TokenRow(tuple((i + j) % 250 for j in range(32)), "") for i in range(num_rows)]
((sums, _),) = worker.sums([rows], ("",))
weights, _ = worker.weights()
done = True
thread.join()
total = float(sum(tensor.sum() for tensor in sums.values())), float(sum(tensor.sum() for tensor in weights.values()))
print(json.dumps({"peak": peak - before, "total": total}))
"""


def run(folder, max_memory_gib, num_rows) -> dict:
    command = [sys.executable, "-c", SCRIPT, json.dumps([str(folder), max_memory_gib, num_rows])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """Random weights, 400 MB of them, nearly all in experts: the folder and the bytes."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=258,
        hidden_size=256,
        intermediate_size=64,
        moe_intermediate_size=168,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        max_position_embeddings=64,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    folder = tmp_path_factory.mktemp("wide")
    model.save_pretrained(folder)
    return folder, sum(parameter.numel() * 4 for parameter in model.parameters())


def test_model_bigger_than_the_budget(wide_model):
    folder, num_bytes = wide_model
    budget = 0.06 * 2**30
    assert num_bytes > 6 * budget
    inside, whole = run(folder, 0.06, 8), run(folder, None, 8)
    assert inside["total"] == pytest.approx(whole["total"], rel=1e-6), "the same sums"
    print(f"weights {num_bytes / 1e6:.0f} MB, budget {budget / 1e6:.0f} MB: peak {inside['peak'] / 1e6:.0f} MB, "
          f"without a budget {whole['peak'] / 1e6:.0f} MB")  # fmt: skip
    # One layer is in memory beside those that fit the budget; the rest are activations and the allocator's leftovers.
    assert inside["peak"] < num_bytes / 2 < num_bytes < whole["peak"]


def test_memory_does_not_grow_with_tokens(tmp_path, tiny_model):
    few, many = run(tiny_model, None, 8), run(tiny_model, None, 800)
    assert many["peak"] < few["peak"] + 24e6
