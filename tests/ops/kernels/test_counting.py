"""The count of one step in torch operations, against a plain one."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.ops.kernels.counting import COUNTERS, count_step
from sere.ops.reference import DECODE, PADDING, PREFILL, reroute_reference
from tests.examples import examples
from tests.ops.strategies import Step, steps


@settings(max_examples=examples(100), deadline=None)
@given(step=steps(max_tokens=30, max_experts=40, max_top_k=6), left_alone=st.booleans())
def test_equals_plain_count(step: Step, left_alone: bool):
    num_tokens, top_k = step.topk_ids.shape
    roles = torch.full((num_tokens,), DECODE, dtype=torch.int8) if step.roles is None else step.roles
    num_decode, real = int((roles == DECODE).sum()), roles != PADDING
    if left_alone:
        roles = roles.masked_fill(roles == DECODE, PREFILL)
    ids = step.topk_ids.long()
    after = reroute_reference(
        step.topk_weights,
        ids,
        step.similarity,
        primary_top_k=step.primary_top_k,
        threshold=step.threshold,
        roles=roles,
    )
    primary, decode_experts = set(), []
    for row in range(num_tokens):
        used = [slot for slot in range(top_k) if ids[row, slot] >= 0]
        used.sort(key=lambda slot: (-step.topk_weights[row, slot].item(), slot))
        if roles[row] != PADDING:
            voting = used[: step.primary_top_k] if roles[row] == DECODE else used
            primary |= {int(ids[row, slot]) for slot in voting}
        if roles[row] == DECODE:
            decode_experts += [(int(ids[row, slot]), int(after[row, slot])) for slot in used]
    active = torch.zeros(step.similarity.shape[0], dtype=torch.bool)
    active[list(primary)] = True
    counters = torch.full((len(COUNTERS),), 100, dtype=torch.int64)
    count_step(
        counters,
        ids_before=ids,
        ids_after=after,
        roles=roles,
        step=torch.tensor([num_decode, int(real.sum()), int(num_decode > 0 and not left_alone)]),
        active=active,
    )
    expected = dict(
        steps=1,
        rerouting_steps=int(not left_alone),
        decode_rows=num_decode,
        decode_slots=num_decode * top_k,
        rerouted_slots=sum(a != b for a, b in decode_experts),
        critical_slots=sum(a == b and a not in primary for a, b in decode_experts),
        active_experts_before=len(set(ids[real].flatten().tolist()) - {-1}),
        active_experts_after=len(set(after[real].flatten().tolist()) - {-1}),
    )
    mixed = int(real.sum()) > num_decode
    pure = not mixed and not left_alone
    expected |= dict(
        mixed_steps=int(mixed),
        mixed_active_experts_before=mixed * expected["active_experts_before"],
        mixed_active_experts_after=mixed * expected["active_experts_after"],
        pure_steps=int(pure),
        pure_active_experts_before=pure * expected["active_experts_before"],
        pure_active_experts_after=pure * expected["active_experts_after"],
    )
    if num_decode == 0:
        expected = dict.fromkeys(COUNTERS, 0)
    assert (counters - 100).tolist() == [expected[name] for name in COUNTERS]
