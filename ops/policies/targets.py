"""Where a slot goes whose expert is not active: the target rules in torch operations of fixed shape."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sere.conf.schema.rules import Targets
from sere.ops.policies.votes import Ballot, RoutedStep


@dataclass(frozen=True)
class Move:
    """A step's slots after the targets' rule."""

    ids: Tensor
    """int64 `[num_tokens, top_k]`."""
    base: Tensor
    """float64, same shape: weights before the weight rule."""
    moved: Tensor
    """bool, same shape: slots with another expert than before, or none."""


def random_similarity(seed: int, layer: int, num_experts: int) -> Tensor:
    """A random similarity of one layer, float32 `[num_experts, num_experts]`, not symmetric, the same for the same seed.

    The most similar active expert under it is a uniformly random one; nothing is drawn while decoding.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
    return torch.rand((num_experts, num_experts), generator=generator, dtype=torch.float32, device="cpu")


def similarity_of(targets: Targets, tables: Mapping[str, Tensor], layer: int, num_experts: int) -> Tensor | None:
    """What a replacement is found by, float32 `[num_experts, num_experts]`, row: the expert replaced; None for other rules."""
    match targets.rule:
        case "similar":
            return tables.get(targets.metric)
        case "random":
            return random_similarity(targets.seed, layer, num_experts)
        case "least_loss":
            return 1 - tables["fold_losses"]
    return None


def move(targets: Targets, step: RoutedStep, ballot: Ballot, similarity: Tensor | None) -> Move:
    """Apply a target rule to a step."""
    base = step.weights.double()
    changeable = step.used & step.decode
    if targets.rule == "own":
        return _own(step, ballot, base, changeable)
    if targets.rule in ("drop", "drop_unvoted"):
        stays = ballot.slots if targets.rule == "drop_unvoted" else step.look_up(ballot.active)
        moved = changeable & ~stays
        return Move(torch.where(moved, _first_active(step, ballot), step.ids), base.masked_fill(moved, 0), moved)
    assert similarity is not None
    # max returns the first, lowest, of equal experts.
    best, replacement = similarity.masked_fill(~ballot.active, -torch.inf).max(dim=1)
    reroutes = (best >= torch.tensor(targets.least_similarity, dtype=torch.float32)) & ~ballot.active
    moved = changeable & step.look_up(reroutes)
    return Move(torch.where(moved, step.look_up(replacement), step.ids), base, moved)


def _first_active(step: RoutedStep, ballot: Ballot) -> Tensor:
    """An active expert for slots that are not used any more: the row's first that stays, `[num_tokens, 1]`."""
    staying = step.used & step.look_up(ballot.active)
    first = step.ids.gather(1, step.weights.masked_fill(~staying, -torch.inf).argmax(1, keepdim=True))
    return torch.where(staying.any(1, keepdim=True), first, ballot.active.int().argmax())


def _own(step: RoutedStep, ballot: Ballot, base: Tensor, changeable: Tensor) -> Move:
    """The row's voted experts, then the best others of the active ones, as many as the row has slots (arXiv 2511.02237)."""
    scores, selection = step.scores, step.selection
    assert scores is not None and selection is not None
    safe, num_experts = step.ids.clamp(min=0), step.num_experts
    num_slots = step.used.sum(1, keepdim=True)
    voted, selected = _rows(ballot.slots, step), _rows(step.used, step)
    keys = selection.masked_fill(~(ballot.active & selection.isfinite()), -torch.inf).masked_fill(voted, torch.inf)
    order = keys.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(num_experts, device=order.device).expand_as(order)
    chosen = (torch.empty_like(order).scatter_(1, order, places) < num_slots) & (keys > -torch.inf)
    moved = changeable & ~chosen.gather(1, safe)
    arriving = chosen & ~selected
    best = selection.masked_fill(~arriving, -torch.inf).sort(dim=1, descending=True, stable=True)
    # The n-th slot that is free takes the n-th best of those that arrive.
    number = (moved.long().cumsum(1) - 1).clamp(min=0)
    filled = moved & (number < arriving.sum(1, keepdim=True))
    new = best.indices.gather(1, number)
    ids = torch.where(filled, new, torch.where(moved, _first_active(step, ballot), step.ids))
    total = scores.gather(1, safe).double().masked_fill(~step.used, 0).sum(1, keepdim=True)
    scale = torch.where(total > 0, step.totals / total, 0)
    arrived = scores.gather(1, new).double() * scale
    return Move(ids, torch.where(filled, arrived, base.masked_fill(moved, 0)), moved)


def _rows(slots: Tensor, step: RoutedStep) -> Tensor:
    """The experts of some slots, by row, bool `[num_tokens, num_experts]`."""
    hit = torch.zeros(len(step.ids), step.num_experts + 1, dtype=torch.bool, device=step.ids.device)
    return hit.scatter_(1, torch.where(slots & step.used, step.ids, step.num_experts), True)[:, : step.num_experts]
