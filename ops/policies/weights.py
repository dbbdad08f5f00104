"""The weight rules in torch operations of fixed shape, and what experts have lost by all of it."""

import torch
from torch import Tensor

from sere.conf.schema.rules import WeightRule
from sere.ops.policies.targets import Move
from sere.ops.policies.votes import RoutedStep


def weigh(rule: WeightRule, step: RoutedStep, move: Move, folds: Tensor | None) -> Tensor:
    """New weights, float64 `[num_tokens, top_k]`; rows in which nothing moved keep theirs to the last bit."""
    weights, base = step.weights.double(), move.base
    if rule == "fold":
        assert folds is not None
        base = torch.where(move.moved, folds[step.ids.clamp(min=0), move.ids.clamp(min=0)].double() * weights, base)
    if rule in ("renormalize", "half"):
        total = base.masked_fill(~step.used, 0).sum(1, keepdim=True)
        ratio = torch.where(total > 0, step.totals / total, 0)
        base = torch.where(step.used, base * (ratio if rule == "renormalize" else ratio.sqrt()), base)
    return torch.where(move.moved.any(1, keepdim=True), base, weights)


def difference_of(step: RoutedStep, new_weights: Tensor, new_ids: Tensor) -> Tensor:
    """Old weights less new ones, dense over experts, float32 `[num_tokens, num_experts]`; 0 but in decode rows."""
    dense = torch.zeros(len(step.ids), step.num_experts + 1, dtype=torch.float32, device=step.ids.device)
    for sign, weights, ids in ((1, step.weights, step.ids), (-1, new_weights, new_ids)):
        slots = step.decode & (ids >= 0)
        dense.scatter_add_(1, torch.where(slots, ids, step.num_experts), sign * weights.float())
    return dense[:, : step.num_experts]
