"""Re-routing of many decode steps of one layer at once, for judging similarity matrices offline."""

import torch
from torch import Tensor

from sere.ops.op import voting_slots

# Elements of the masked similarities held at once (256 MiB of float32).
_BLOCK_ELEMENTS = 1 << 26


def reroute_groups(
    topk_weights: Tensor,
    topk_ids: Tensor,
    similarity: Tensor,
    *,
    primary_top_k: int,
    thresholds: Tensor,
) -> Tensor:
    """Re-route groups of rows as if each were one decode step: `sere.ops.reference.reroute_reference`, group by group.

    Args:
        topk_weights: Float `[num_groups, num_tokens, top_k]`.
        topk_ids: int64, same shape; no unused slots.
        similarity: float32 `[num_experts, num_experts]`; row: the expert replaced, column: its replacement.
        primary_top_k: Slots per row that vote (the paper's S).
        thresholds: float32 `[num_thresholds]`: least similarities that re-route (the paper's rho).

    Returns:
        New ids, int64 `[num_thresholds, num_groups, num_tokens, top_k]`.
    """
    num_groups, _, top_k = topk_ids.shape
    num_experts = similarity.shape[0]
    rows = topk_ids.reshape(-1, top_k)
    votes = voting_slots(topk_weights.reshape(-1, top_k), rows, primary_top_k, None).view(topk_ids.shape)
    # Slots without a vote write to one expert past the last.
    voted = torch.where(votes, topk_ids, num_experts).view(num_groups, -1)
    primary = torch.zeros(num_groups, num_experts + 1, dtype=torch.bool, device=topk_ids.device).scatter_(1, voted, True)
    primary = primary[:, :num_experts]
    own = torch.arange(num_experts, device=topk_ids.device)
    tables = []
    for part in primary.split(max(1, _BLOCK_ELEMENTS // num_experts**2)):
        # max returns the first, lowest, of equal experts.
        best, replacement = similarity.masked_fill(~part.unsqueeze(1), -torch.inf).max(dim=2)
        reroutes = (best >= thresholds.view(-1, 1, 1)) & ~part
        tables.append(torch.where(reroutes, replacement, own))
    table = torch.cat(tables, dim=1)
    ids = topk_ids.reshape(1, num_groups, -1).expand(len(thresholds), -1, -1)
    return table.gather(2, ids).view(len(thresholds), *topk_ids.shape)
