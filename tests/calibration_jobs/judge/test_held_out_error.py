"""Held-out re-routing error against running the experts with the re-routed ids, step by step."""

import math

import pytest
import torch

from sere.calibration_jobs.capture.batches import pad_rows
from sere.calibration_jobs.capture.experts import intercept_experts
from sere.calibration_jobs.judge.candidates import RANDOM, Candidate, settings_of
from sere.calibration_jobs.judge.decode_steps import decode_groups
from sere.calibration_jobs.judge.held_out_error import SUMS, routing_error
from sere.ops.reference import reroute_reference
from tests.calibration_jobs.capture.test_experts import make

ROWS = [tuple(torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(i)).tolist()) for i, length in enumerate(
    (9, 7, 9, 5, 9, 9, 8)
)]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return make("qwen3_moe")


def candidates() -> list[Candidate]:
    found = []
    for number, name in enumerate(("cosine", RANDOM, RANDOM)):
        generator = torch.Generator().manual_seed(number)
        matrices = {layer: torch.rand(6, 6, generator=generator) for layer in range(3)}
        found.append(Candidate(name, matrices, (0.0, 0.6) if name == "cosine" else (0.0,)))
    return found


def direct(model, batch_size: int, candidate: Candidate, threshold: float, primary_top_k: int) -> dict[int, dict[str, float]]:
    """From the definition: one step at a time, the reference's ids, the model's own experts."""
    batch = pad_rows(sorted(ROWS, key=len, reverse=True))
    groups = decode_groups(batch["attention_mask"].bool(), batch_size).tolist()
    found = {}

    def handle(call):
        total = dict.fromkeys(SUMS, 0.0)
        for group in groups:
            hidden, ids, weights = call.hidden_states[group], call.topk_ids[group], call.topk_weights[group]
            new = reroute_reference(
                weights, ids, candidate.matrices[call.layer], primary_top_k=primary_top_k, threshold=threshold
            )
            ranked = weights.argsort(dim=1, descending=True, stable=True)
            primary = set(ids.gather(1, ranked[:, :primary_top_k]).flatten().tolist())
            before, after = call.forward(hidden, ids, weights), call.forward(hidden, new, weights)
            total["squared_error"] += (after - before).square().sum().item()
            total["squared_output"] += before.square().sum().item()
            total["aligned"] += torch.nn.functional.cosine_similarity(before, after).sum().item()
            total["tokens"] += len(group)
            total["secondary"] += sum(expert not in primary for expert in ids.flatten().tolist())
            total["critical"] += sum(expert not in primary for expert in new.flatten().tolist())
            total["active_before"] += len(ids.unique())
            total["active_after"] += len(new.unique())
            total["steps"] += 1
        found[call.layer] = total
        return call.run()

    with torch.inference_mode(), intercept_experts(model, handle):
        model(**batch, use_cache=False)
    return found


@pytest.mark.parametrize("block_tokens", [5, 1000])
def test_sums_are_those_of_the_definition(model, block_tokens):
    sizes, top_ks = (2, 3), (1,)
    sums = routing_error(model, ROWS, candidates(), primary_top_k=top_ks, batch_sizes=sizes, block_tokens=block_tokens)
    settings = settings_of(candidates(), primary_top_k=top_ks, batch_sizes=sizes)
    assert sorted(sums) == [0, 1, 2] and len(settings) == 8
    # In the order of the settings: draws of the control have one name.
    judged = [candidate for _ in sizes for candidate in candidates() for _ in top_ks for _ in candidate.thresholds]
    for index, (setting, candidate) in enumerate(zip(settings, judged, strict=True)):
        assert setting.candidate == candidate.name
        expected = direct(model, setting.batch_size, candidate, setting.threshold, setting.primary_top_k)
        for layer, values in sums.items():
            for name, value in zip(SUMS, values[index].tolist(), strict=True):
                assert math.isclose(value, expected[layer][name], rel_tol=1e-4, abs_tol=1e-9), (setting, layer, name)
    assert any(sums[0][i, SUMS.index("critical")] > 0 for i in range(len(settings))), "the threshold keeps some"
