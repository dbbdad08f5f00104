"""How a router makes scores of its logits and what it ranks by, for all families that policies can follow."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Selection scores this close are as good as equal: implementations differ in the last bits of exp.
_TIE_ULP = 4
_WEIGHT_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True, eq=False)
class Scoring:
    """A router's function from logits to scores, without the choice itself.

    Softmax over the selected experts (gpt-oss, mixtral) is softmax with weights that are renormalised.
    """

    function: Literal["softmax", "sigmoid"]
    bias: Tensor | None = None
    """float32 `[num_experts]`, added to the scores to rank by, not to weigh by (DeepSeek-V3). None: no bias."""
    num_groups: int = 1
    """Groups of neighbouring experts, of equal size."""
    groups_kept: int = 1
    """So many of a row's groups can be chosen from."""
    group_score: Literal["max", "top2"] = "max"
    """What groups are ranked by: their best expert's selection score, or the sum of their best two (DeepSeek-V3)."""

    def scores(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and what the router ranks by.

        Args:
            logits: Float `[num_tokens, num_experts]`.

        Returns:
            Scores, float32 of the same shape, in [0, 1]; and selection scores: scores plus bias, minus infinity outside the
            groups that the router chooses for the row.
        """
        logits = logits.float()
        scores = logits.softmax(-1) if self.function == "softmax" else logits.sigmoid()
        selection = scores if self.bias is None else scores + self.bias.to(scores)
        if self.groups_kept < self.num_groups:
            grouped = selection.unflatten(-1, (self.num_groups, -1))
            best = grouped.amax(-1) if self.group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
            kept = torch.zeros_like(best, dtype=torch.bool)
            kept.scatter_(-1, best.topk(self.groups_kept, dim=-1).indices, True)
            selection = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
        return scores, selection


def reproduces(scoring: Scoring, logits: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> bool:
    """Whether a router's choice is what `scoring` says: the top-k of the selection scores, with weights proportional to the
    scores within each row.

    Args:
        scoring: The assumption.
        logits: The router's, float `[num_tokens, num_experts]`.
        topk_weights: What the router answered, float `[num_tokens, top_k]`.
        topk_ids: Likewise, integers, without unused slots.
    """
    scores, selection = scoring.scores(logits)
    ids, weights = topk_ids.long(), topk_weights.double()
    if int(ids.min()) < 0 or any(len(set(row)) < len(row) for row in ids.tolist()):
        return False
    chosen = selection.gather(1, ids)
    others = selection.scatter(1, ids, -torch.inf).amax(1)
    worst = chosen.amin(1)
    # Where all finite experts are chosen, nothing is left to compare with.
    slack = _TIE_ULP * torch.finfo(torch.float32).eps * worst.abs().clamp(min=1e-6)
    if not torch.isfinite(worst).all() or (others > worst + slack).any():
        return False
    expected = scores.gather(1, ids).double()
    scale = weights.sum(1, keepdim=True) / expected.sum(1, keepdim=True).clamp(min=1e-300)
    largest = weights.amax(1, keepdim=True)
    return bool(((expected * scale - weights).abs() <= _WEIGHT_TOLERANCE * largest).all() and (largest > 0).all())
