"""Teacher-forced emulation: the unmodified model through it is the model itself; policies do what the reference does."""

import dataclasses
import math

import pytest
import torch

from sere.calibration_jobs.capture.batches import pad_rows
from sere.calibration_jobs.capture.experts import intercept_experts
from sere.calibration_jobs.judge.candidates import Emulated
from sere.calibration_jobs.judge.decode_steps import static_steps
from sere.calibration_jobs.judge.emulation import ROW_FIGURES, SUMS, Answered, AnswerEmulation, emulate
from sere.calibration_jobs.judge.policy_router import PolicyRouter
from sere.conf.schema import RerouteConfig
from sere.ops.kernels.counting import COUNTERS
from sere.ops.reference import reroute_reference
from tests.calibration_jobs.capture.test_experts import FAMILIES, make
from tests.calibration_jobs.judge.test_held_out_error import ROWS

MATRICES = {layer: torch.rand(6, 6, generator=torch.Generator().manual_seed(layer)) for layer in range(3)}
TABLES = {layer: {"cosine": matrix} for layer, matrix in MATRICES.items()}
NONE = Emulated("none", RerouteConfig(policy="none"))


def policy(name: str, primary_top_k: int = 1) -> Emulated:
    reroute = RerouteConfig(policy=name, similarity="memory", primary_top_k=primary_top_k, threshold=0.0, min_tokens=1)
    return Emulated(name, reroute, TABLES)


def through(model, emulated: Emulated) -> torch.Tensor:
    batch = pad_rows(ROWS)
    steps = static_steps([len(row) for row in ROWS], len(ROWS), batch["attention_mask"].shape[1])
    with torch.inference_mode(), intercept_experts(model, PolicyRouter(emulated, steps)):
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


PROMPTED = [Answered(tuple(row[:2]), tuple(row[2:])) for row in ROWS if len(row) > 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_after_exact_prompts_are_the_models_own(family):
    model = make(family)
    found = AnswerEmulation(model, PROMPTED).run(NONE, batch_size=2)
    assert torch.equal(found.rows[:, ROW_FIGURES.index("kl")], torch.zeros(len(PROMPTED), dtype=torch.float64))
    nll = ROW_FIGURES.index("nll")
    for row, figures in zip(PROMPTED, found.rows, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([[*row.prompt, *row.answer]])
            logits = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        expected = -sum(logits[len(row.prompt) - 1 + n, token].item() for n, token in enumerate(row.answer))
        assert math.isclose(figures[nll], expected, rel_tol=1e-4)
        assert figures[ROW_FIGURES.index("tokens")] == len(row.answer)


def test_prompts_and_small_steps_are_left_alone():
    emulation = AnswerEmulation(make("qwen3_moe"), PROMPTED)
    changed = emulation.run(policy("sere"), batch_size=len(PROMPTED))
    assert changed.rows[:, ROW_FIGURES.index("kl")].sum() > 0
    assert changed.counts["decode_rows"] == 3 * sum(len(row.answer) - 1 for row in PROMPTED)
    alone = Emulated("sere", dataclasses.replace(policy("sere").reroute, min_tokens=99), TABLES)
    left = emulation.run(alone, batch_size=len(PROMPTED))
    assert left.rows[:, ROW_FIGURES.index("kl")].sum() == 0 and left.counts["rerouting_steps"] == 0
    # The first token of an answer comes from the prompt.
    single = [Answered(row.prompt, row.answer[:1]) for row in PROMPTED] + PROMPTED[:1]
    rows = AnswerEmulation(make("qwen3_moe"), single).run(policy("sere"), batch_size=9).rows
    assert rows[:-1, ROW_FIGURES.index("kl")].sum() == 0
    assert set(changed.counts) == set(COUNTERS)
