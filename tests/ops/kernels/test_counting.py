"""The count of one step in torch operations, against a plain one."""

import torch
from hypothesis import given, settings

from sere.ops.kernels.counting import COUNTERS, count_step
from sere.ops.reference import DECODE, PADDING, reroute_reference
from tests.examples import examples
from tests.ops.strategies import Step, steps


@settings(max_examples=examples(100), deadline=None)
@given(step=steps(max_tokens=30, max_experts=40, max_top_k=6))
def test_equals_plain_count(step: Step):
    num_tokens, top_k = step.topk_ids.shape
    roles = torch.full((num_tokens,), DECODE, dtype=torch.int8) if step.roles is None else step.roles
    after = reroute_reference(
        step.topk_weights,
        step.topk_ids,
        step.similarity,
        primary_top_k=step.primary_top_k,
        threshold=step.threshold,
        roles=roles,
    )
    num_decode = int((roles == DECODE).sum())
    counters = torch.full((len(COUNTERS),), 100, dtype=torch.int64)
    count_step(
        counters,
        topk_weights=step.topk_weights,
        ids_before=step.topk_ids,
        ids_after=after,
        roles=roles,
        num_decode_rows=torch.tensor(num_decode),
        num_experts=step.similarity.shape[0],
        primary_top_k=step.primary_top_k,
    )
    primary, decode_experts = set(), []
    for row in range(num_tokens):
        used = [slot for slot in range(top_k) if step.topk_ids[row, slot] >= 0]
        used.sort(key=lambda slot: (-step.topk_weights[row, slot].item(), slot))
        if roles[row] != PADDING:
            voting = used[: step.primary_top_k] if roles[row] == DECODE else used
            primary |= {int(step.topk_ids[row, slot]) for slot in voting}
        if roles[row] == DECODE:
            decode_experts += [(int(step.topk_ids[row, slot]), int(after[row, slot])) for slot in used]
    real = roles != PADDING
    expected = dict(
        steps=1,
        rerouting_steps=int(num_decode > 0),
        decode_rows=num_decode,
        decode_slots=num_decode * top_k,
        rerouted_slots=sum(a != b for a, b in decode_experts),
        critical_slots=sum(a == b and a not in primary for a, b in decode_experts),
        active_experts_before=len(set(step.topk_ids[real].flatten().tolist()) - {-1}),
        active_experts_after=len(set(after[real].flatten().tolist()) - {-1}),
    )
    mixed = int(real.sum()) > num_decode
    expected |= dict(
        mixed_steps=int(mixed),
        mixed_active_experts_before=mixed * expected["active_experts_before"],
        mixed_active_experts_after=mixed * expected["active_experts_after"],
    )
    if num_decode == 0:
        expected = dict.fromkeys(COUNTERS, 0)
    assert (counters - 100).tolist() == [expected[name] for name in COUNTERS]
