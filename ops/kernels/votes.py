"""Step 1 of the reference in torch operations of fixed shape, on any device and inside CUDA graphs: who votes for what."""

import torch
from torch import Tensor

from sere.ops.reference import DECODE, PREFILL


def voting_slots(topk_weights: Tensor, topk_ids: Tensor, primary_top_k: int, roles: Tensor | None) -> Tensor:
    """The slots that make their expert primary, bool `[num_tokens, top_k]`."""
    used = topk_ids >= 0
    order = topk_weights.masked_fill(~used, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    votes = torch.zeros_like(used).scatter_(1, order[:, :primary_top_k], True).logical_and_(used)
    if roles is None:
        return votes
    role = roles.unsqueeze(1)
    return votes.logical_and_(role == DECODE).logical_or_(used.logical_and_(role == PREFILL))


def primary_experts(topk_ids: Tensor, votes: Tensor, num_experts: int) -> Tensor:
    """Which experts are primary, bool `[num_experts]`."""
    # Slots without a vote write to one expert past the last.
    target = torch.where(votes, topk_ids.long(), num_experts).flatten()
    primary = torch.zeros(num_experts + 1, dtype=torch.bool, device=topk_ids.device)
    return primary.index_fill_(0, target, True)[:num_experts]
