"""Routers of every family: how they make scores is found from their choice alone."""

import gc
import weakref

import pytest
import torch

from sere.calibration_jobs.capture.batches import pad_rows
from sere.calibration_jobs.capture.experts import intercept_experts
from sere.ops.policies.scoring import reproduces
from tests.calibration_jobs.capture.test_experts import make

ROWS = [list(range(3, 20)), [5, 9, 2, 33, 41], list(range(40, 60))]
FUNCTIONS = {
    "qwen2_moe": "softmax",
    "qwen3_moe": "softmax",
    "mixtral": "softmax",
    "olmoe": "softmax",
    "deepseek_v2": "softmax",
    "deepseek_v3": "sigmoid",
    "glm4_moe": "sigmoid",
    "gpt_oss": "softmax",
    "granitemoe": "softmax",
    "minimax_m2": "sigmoid",
    "afmoe": "sigmoid",
    "ernie4_5_moe": "softmax",
}
# Beside the router, or in a module of its own within it.
WITH_BIAS = ("deepseek_v3", "glm4_moe", "minimax_m2", "afmoe", "ernie4_5_moe")


def scorings(model):
    found = {}

    def handle(call):
        found[call.layer] = call.scoring
        if call.scoring is not None:
            # Weights aside, which a model of a narrow type has rounded.
            scores = call.scoring.scores(call.router_logits())[0]
            assert reproduces(call.scoring, call.router_logits(), scores.gather(1, call.topk_ids), call.topk_ids)
            is_wide = call.topk_weights.dtype == torch.float32
            assert not is_wide or reproduces(call.scoring, call.router_logits(), call.topk_weights, call.topk_ids)
        return call.run()

    with torch.inference_mode(), intercept_experts(model, handle):
        model(**pad_rows(ROWS), use_cache=False)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "function"), FUNCTIONS.items())
def test_families(family, function, dtype):
    model = make(family).to(dtype)
    for name, buffer in [*model.named_buffers(), *model.named_parameters()]:
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            buffer.data.normal_(std=0.05)
    found = scorings(model)
    assert found and all(scoring is not None and scoring.function == function for scoring in found.values())
    assert all((scoring.bias is not None) == (family in WITH_BIAS) for scoring in found.values())
    assert not any(module._forward_hooks for module in model.modules())


def test_groups_are_found():
    sizes = dict(n_routed_experts=16, num_experts=16, num_local_experts=16, n_group=4, topk_group=2, num_experts_per_tok=3)
    model = make("deepseek_v3", **sizes)
    found = scorings(model)
    assert {(scoring.num_groups, scoring.groups_kept, scoring.group_score) for scoring in found.values()} == {(4, 2, "top2")}


def test_a_router_that_cannot_be_followed_has_no_scoring():
    # Phi's mixes jitter and a mask of its own into the second choice.
    assert set(scorings(make("phimoe")).values()) == {None}


def test_a_model_is_given_back_with_its_routers():
    model = make("minimax_m2")
    scorings(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
