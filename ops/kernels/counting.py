"""What is counted of a step, and how in torch operations. The compiled paths count the same in their own pass."""

import torch
from torch import Tensor

from sere.ops.reference import DECODE, PADDING

COUNTERS = (
    "steps",  # steps with at least one decode row; the counters below are sums over these steps
    "rerouting_steps",  # of those, steps within min_tokens and max_tokens
    "decode_rows",
    "decode_slots",  # decode_rows times top_k
    "rerouted_slots",  # slots of decode rows that have another expert than before
    "critical_slots",  # slots of decode rows in rerouting steps that kept an expert that is not active by vote
    "active_experts_before",  # distinct experts of all rows but padding, as the router chose them
    "active_experts_after",
    "mixed_steps",  # of the steps, those that also had prefill rows, which make most experts active
    "mixed_active_experts_before",
    "mixed_active_experts_after",
    "pure_steps",  # of the rerouting steps, those without prefill rows: where a policy acts, and alone
    "pure_active_experts_before",
    "pure_active_experts_after",
)


def count_step(counters: Tensor, *, ids_before: Tensor, ids_after: Tensor, roles: Tensor, step: Tensor, active: Tensor) -> None:
    """Add one step of one layer to its counters. Only tensor operations of fixed shape: safe inside a CUDA graph.

    Args:
        counters: int64 `[len(COUNTERS)]`, changed in place.
        ids_before: int64 `[num_tokens, top_k]`, as the router made them.
        ids_after: Same shape, as the policy made them.
        roles: int8 `[num_tokens]` as the policy saw them: all decode rows are prefill rows in a step that is left alone.
        step: int64 `[3]` (`TokenRoles.step`), of which the first is used: decode rows, whether left alone or not.
        active: bool `[num_experts]`: the experts that were voted for.
    """
    num_decode_rows = step[0]
    decodes = roles == DECODE
    used = (ids_before >= 0).logical_and_((roles != PADDING).unsqueeze(1))
    changeable = used & decodes.unsqueeze(1)
    changed = changeable & (ids_before != ids_after)
    kept = (changeable & ~changed).logical_and_(~active[ids_before.clamp(min=0)])
    counted = num_decode_rows > 0
    mixed = (roles != PADDING).sum() > num_decode_rows
    pure = decodes.any() & ~mixed
    before = _num_experts(ids_before, used, len(active))
    after = _num_experts(ids_after, used & (ids_after >= 0), len(active))
    values = torch.stack(
        [
            counted,
            decodes.any(),
            num_decode_rows,
            num_decode_rows * ids_before.shape[1],
            changed.sum(),
            kept.sum(),
            before,
            after,
            mixed,
            before * mixed,
            after * mixed,
            pure,
            before * pure,
            after * pure,
        ]
    )
    counters.add_(values * counted)


def _num_experts(ids: Tensor, slots: Tensor, num_experts: int) -> Tensor:
    hit = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    return hit.index_fill_(0, torch.where(slots, ids, num_experts).flatten(), 1)[:num_experts].sum()
