"""Teacher-forced emulation: the unmodified model through it is the model itself; policies do what the reference does."""

import math

import pytest
import torch

from sere.calibration_jobs.capture.batches import pad_rows
from sere.calibration_jobs.capture.experts import intercept_experts
from sere.calibration_jobs.judge.candidates import Emulated
from sere.calibration_jobs.judge.emulation import SUMS, PolicyRouter, emulate
from sere.conf.schema import RerouteConfig
from sere.ops.reference import reroute_reference
from tests.calibration_jobs.capture.test_experts import FAMILIES, make
from tests.calibration_jobs.judge.test_held_out_error import ROWS

MATRICES = {layer: torch.rand(6, 6, generator=torch.Generator().manual_seed(layer)) for layer in range(3)}
NONE = Emulated("none", RerouteConfig(policy="none"))


def policy(name: str, primary_top_k: int = 1) -> Emulated:
    reroute = RerouteConfig(policy=name, similarity="memory", primary_top_k=primary_top_k, threshold=0.0)
    return Emulated(name, reroute, MATRICES if name == "sere" else None)


def through(model, emulated: Emulated) -> torch.Tensor:
    batch = pad_rows(ROWS)
    with torch.inference_mode(), intercept_experts(model, PolicyRouter(emulated, batch["attention_mask"].bool())):
        return model(**batch, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_unmodified_model_is_its_ordinary_forward(family):
    model = make(family)
    with torch.inference_mode():
        ordinary = model(**pad_rows(ROWS), use_cache=False).logits
    assert torch.equal(through(model, NONE), ordinary)
    assert torch.equal(through(model, policy("sere", primary_top_k=2)), ordinary), "S = top_k re-routes nothing"
    assert not torch.equal(through(model, policy("sere")), ordinary)


def test_sere_routes_each_position_as_the_reference_does():
    model, batch = make("qwen3_moe"), pad_rows(ROWS)
    valid = batch["attention_mask"].bool()

    def handle(call):
        ids = call.topk_ids.view(*valid.shape, -1).clone()
        weights = call.topk_weights.view(*valid.shape, -1)
        for position in range(valid.shape[1]):
            # Without the padding rows altogether: they must not vote.
            rows = valid[:, position]
            ids[rows, position] = reroute_reference(
                weights[rows, position], ids[rows, position], MATRICES[call.layer], primary_top_k=1, threshold=0.0
            )
        return call.run(ids.view_as(call.topk_ids))

    with torch.inference_mode(), intercept_experts(model, handle):
        expected = model(**batch, use_cache=False).logits
    assert torch.equal(through(model, policy("sere"))[valid], expected[valid])


def test_top_k_drops_slots():
    model, batch = make("qwen3_moe", norm_topk_prob=True), pad_rows(ROWS)
    valid = batch["attention_mask"].bool()

    def only_first(call):
        weights, slots = call.topk_weights.max(dim=1, keepdim=True)
        return call.run(call.topk_ids.gather(1, slots), torch.ones_like(weights))

    with torch.inference_mode(), intercept_experts(model, only_first):
        expected = model(**batch, use_cache=False).logits
    torch.testing.assert_close(through(model, policy("top_k"))[valid], expected[valid], atol=1e-5, rtol=1e-4)


def test_figures():
    model = make("qwen3_moe")
    policies = [NONE, policy("sere"), policy("random"), policy("top_k")]
    sums = emulate(model, ROWS, policies)
    assert torch.equal(sums, emulate(model, ROWS, policies)), "deterministic"
    values = [dict(zip(SUMS, line.tolist(), strict=True)) for line in sums]
    batch = pad_rows(ROWS)
    valid, num_predicted = batch["attention_mask"].bool(), sum(len(row) - 1 for row in ROWS)
    with torch.inference_mode():
        base = model(**batch, use_cache=False).logits.double().log_softmax(-1)
    for emulated, value in zip(policies, values, strict=True):
        logits = through(model, emulated).double().log_softmax(-1)
        nll = kl = agreement = 0.0
        for row, tokens in enumerate(ROWS):
            for position in range(len(tokens) - 1):
                ours, theirs = logits[row, position], base[row, position]
                nll -= ours[tokens[position + 1]].item()
                kl += (theirs.exp() * (theirs - ours)).sum().item()
                agreement += float(ours.argmax() == theirs.argmax())
        assert math.isclose(value["nll"], nll, rel_tol=1e-9) and math.isclose(value["kl"], kl, rel_tol=1e-6, abs_tol=1e-9)
        assert value["agreement"] == agreement and value["tokens"] == num_predicted
        assert value["layer_steps"] == 3 * valid.shape[1]
    assert values[0]["kl"] == 0 and values[0]["agreement"] == num_predicted
    assert all(value["kl"] > 0 and value["active_experts"] < values[0]["active_experts"] for value in values[1:])
