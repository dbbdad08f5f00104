"""Re-routing on the CPU, in torch operations whose shapes depend on the data: not for a GPU, which would be waited for."""

from typing import Any

import torch
from torch import Tensor

from sere.ops.kernels.votes import primary_experts, voting_slots
from sere.ops.reference import DECODE


def reroute(
    topk_weights: Tensor,
    topk_ids: Tensor,
    similarity: Tensor,
    *,
    primary_top_k: int,
    threshold: float,
    roles: Tensor | None,
) -> Tensor:
    """Re-route one step of one layer; arguments and result are those of `reroute_reference`."""
    if topk_ids.numel() == 0 or primary_top_k >= topk_ids.shape[1]:
        return topk_ids.clone()
    num_experts = similarity.shape[0]
    votes = voting_slots(topk_weights, topk_ids, primary_top_k, roles)
    primary = primary_experts(topk_ids, votes, num_experts)
    # Only the primary experts' columns are searched; they ascend, and argmax takes the first, lowest, of equals.
    candidates = primary.nonzero().squeeze(1)
    if candidates.numel() in (0, num_experts):
        return topk_ids.clone()
    best, column = similarity.index_select(1, candidates).max(dim=1)
    reroutes = (best >= threshold).logical_and_(~primary)
    table = torch.where(reroutes, candidates[column], torch.arange(num_experts)).to(topk_ids.dtype)
    rerouted = table[topk_ids.clamp(min=0).flatten().long()].view_as(topk_ids)
    # A slot that voted has a primary expert, which the table maps to itself.
    changeable = topk_ids >= 0
    if roles is not None:
        changeable.logical_and_((roles == DECODE).unsqueeze(1))
    return torch.where(changeable, rerouted, topk_ids)


def compiled_step(rules: Any, layer: Any, similarity: Tensor | None, tables: Any) -> Any:
    """A whole step in compiled code; None: torch's operations do it."""
    return None
