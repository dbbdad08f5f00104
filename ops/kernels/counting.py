"""What is counted of a step, and how in torch operations. `reroute.cu` counts the same in its own launch."""

import torch
from torch import Tensor

from sere.ops.kernels.votes import primary_experts, voting_slots
from sere.ops.reference import DECODE, PADDING

COUNTERS = (
    "steps",  # steps with at least one decode row; the counters below are sums over these steps
    "rerouting_steps",  # of those, steps within min_tokens and max_tokens
    "decode_rows",
    "decode_slots",  # decode_rows times top_k
    "rerouted_slots",  # slots of decode rows that the policy changed
    "critical_slots",  # secondary slots of non-primary experts that kept their expert in rerouting steps
    "active_experts_before",  # distinct experts of all rows but padding, as the router chose them
    "active_experts_after",
    "mixed_steps",  # of the steps, those that also had prefill rows, which make most experts active
    "mixed_active_experts_before",
    "mixed_active_experts_after",
)


def count_step(
    counters: Tensor,
    *,
    topk_weights: Tensor,
    ids_before: Tensor,
    ids_after: Tensor,
    roles: Tensor,
    num_decode_rows: Tensor,
    num_experts: int,
    primary_top_k: int,
) -> None:
    """Add one step of one layer to its counters. Only tensor operations of fixed shape: safe inside a CUDA graph.

    Args:
        counters: int64 `[len(COUNTERS)]`, changed in place.
        topk_weights: float `[num_tokens, top_k]`, as the router made them.
        ids_before: int32 or int64 `[num_tokens, top_k]`, as the router made them.
        ids_after: Same shape and dtype, as the policy made them.
        roles: int8 `[num_tokens]` as the policy saw them: all decode rows are prefill rows in a step that is left alone.
        num_decode_rows: int64 `[]`, decode rows of the step, whether left alone or not.
        num_experts: Experts of the layer.
        primary_top_k: Slots per decode row that vote.
    """
    used = (ids_before >= 0).logical_and_((roles != PADDING).unsqueeze(1))
    changeable = used & (roles == DECODE).unsqueeze(1)
    changed = changeable & (ids_before != ids_after)
    votes = voting_slots(topk_weights, ids_before, primary_top_k, roles)
    primary = primary_experts(ids_before, votes, num_experts)
    kept = (changeable & ~changed).logical_and_(~primary[ids_before.clamp(min=0).long()])
    counted = num_decode_rows > 0
    mixed = (roles != PADDING).sum() > num_decode_rows
    active_before = primary_experts(ids_before, used, num_experts).sum()
    active_after = primary_experts(ids_after, used & (ids_after >= 0), num_experts).sum()
    values = torch.stack(
        [
            counted,
            (roles == DECODE).any(),
            num_decode_rows,
            num_decode_rows * ids_before.shape[1],
            changed.sum(),
            kept.sum(),
            active_before,
            active_after,
            mixed,
            active_before * mixed,
            active_after * mixed,
        ]
    )
    counters.add_(values * counted)
