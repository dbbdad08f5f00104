"""Calibration on a GPU: the figures are those of the CPU."""

import pytest
import torch

# What calibration needs beside torch.
pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from sere.calibration_jobs.capture.batches import pad_rows
from sere.calibration_jobs.capture.experts import observe_experts
from sere.calibration_jobs.judge.emulation import emulate
from sere.calibration_jobs.judge.held_out_error import routing_error
from sere.calibration_jobs.metrics import METRIC_CLASSES
from sere.calibration_jobs.metrics.weights import weight_similarity
from tests.calibration_jobs.capture.test_experts import FAMILIES, make
from tests.calibration_jobs.judge.test_emulation import NONE, ROWS, policy
from tests.calibration_jobs.judge.test_held_out_error import candidates


def matrices(family: str, device: str) -> dict:
    model = make(family).to(device)
    found = {}

    def observe(layer, outputs, _):
        for name, metric in METRIC_CLASSES.items():
            found.setdefault((layer, name), metric(6)).update(outputs)

    observe_experts(model, [pad_rows(ROWS, device)], observe, block_tokens=16)
    weights = {(0, "weights"): weight_similarity(next(m for m in model.modules() if hasattr(m, "gate_up_proj")))}
    return {key: metric.finalize() for key, metric in found.items()} | weights


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices(family):
    on_cpu = matrices(family, "cpu")
    for key, matrix in matrices(family, "cuda").items():
        torch.testing.assert_close(matrix, on_cpu[key], atol=2e-3, rtol=0)


def test_held_out_error_and_emulation():
    settings = {"primary_top_k": (1,), "batch_sizes": (2, 3), "block_tokens": 16}
    policies = [NONE, policy("sere"), policy("random"), policy("top_k")]
    on_cpu, on_gpu = make("qwen3_moe"), make("qwen3_moe").cuda()
    errors = routing_error(on_gpu, ROWS, candidates(), device="cuda", **settings)
    for layer, sums in routing_error(on_cpu, ROWS, candidates(), **settings).items():
        torch.testing.assert_close(errors[layer], sums, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(
        emulate(on_gpu, ROWS, policies, device="cuda"), emulate(on_cpu, ROWS, policies), atol=1e-2, rtol=1e-2
    )
