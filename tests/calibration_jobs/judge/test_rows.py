"""Figures from the sums of tasks."""

import math

import pytest
import torch

from sere.calibration_jobs.judge import emulation
from sere.calibration_jobs.judge.candidates import Emulated
from sere.calibration_jobs.judge.held_out_error import SUMS, routing_error
from sere.calibration_jobs.judge.rows import emulation_rows, held_out_rows
from sere.calibration_jobs.judge.tasks import emulation_tasks
from sere.calibration_jobs.shards import TokenRow
from sere.calibration_jobs.workers.task import LayerTensors
from sere.conf.schema import RerouteConfig
from tests.calibration_jobs.capture.test_experts import make
from tests.calibration_jobs.judge.test_held_out_error import ROWS, candidates


def test_rows_are_means_over_layers_and_draws_of_the_control():
    model = make("qwen3_moe")
    arguments = {"primary_top_k": (1,), "batch_sizes": (2,)}
    parts = [routing_error(model, rows, candidates(), block_tokens=50, **arguments) for rows in (ROWS[:4], ROWS[4:])]
    results = [LayerTensors(part).to_result() for part in parts]
    rows = held_out_rows(results, candidates(), (2,), (1,))
    assert [(row["candidate"], row["threshold"]) for row in rows] == [("cosine", 0.0), ("cosine", 0.6), ("random", 0.0)]
    error, output = SUMS.index("squared_error"), SUMS.index("squared_output")

    def layer_error(layer: int, index: int) -> float:
        total = parts[0][layer][index] + parts[1][layer][index]
        return math.sqrt(total[error] / total[output])

    assert math.isclose(rows[0]["error"], sum(layer_error(layer, 0) for layer in range(3)) / 3)
    assert math.isclose(rows[2]["layers"][1], (layer_error(1, 2) + layer_error(1, 3)) / 2)
    assert rows[0]["critical_share"] == 0 < rows[1]["critical_share"]
    assert rows[1]["active_after"] > rows[0]["active_after"] and rows[0]["active_before"] > rows[0]["active_after"]


def test_emulation_is_summed_by_the_tasks_decode_batch():
    rows = [TokenRow((1, 2, 3), "") for _ in range(5)] + [TokenRow((1,), "")]
    tasks = emulation_tasks("a-emulation-16", rows, None, (2, 4))
    assert [(task.name, task.batch_size, len(task.arguments[0])) for task in tasks] == [
        ("a-emulation-16-0002-0000", 2, 2),
        ("a-emulation-16-0002-0001", 2, 2),
        ("a-emulation-16-0004-0000", 4, 4),
    ]
    policies = [
        Emulated("none", RerouteConfig(policy="none")),
        Emulated("top_k", RerouteConfig(policy="top_k", primary_top_k=2)),
    ]
    value = {
        "nll": 2.0,
        "kl": 1.0,
        "agreement": 3.0,
        "tokens": 4.0,
        "active_experts": 6.0,
        "layer_steps": 2.0,
        "charged_experts": 7.0,
    }
    sums = torch.tensor([[value[name] for name in emulation.SUMS]] * 2, dtype=torch.float64)
    found = emulation_rows([(task, ({"sums": sums}, {})) for task in tasks], policies)
    assert [(row["policy"], row["batch_size"], row["primary_top_k"], row["num_tokens"]) for row in found] == [
        ("none", 2, None, 8),
        ("top_k", 2, 2, 8),
        ("none", 4, None, 4),
        ("top_k", 4, 2, 4),
    ]
    assert found[0]["perplexity"] == pytest.approx(math.exp(0.5)) and found[0]["active_experts"] == 3
