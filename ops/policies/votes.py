"""Who is active: the vote rules in torch operations of fixed shape, on any device and inside CUDA graphs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sere.conf.schema.rules import Votes
from sere.ops.reference_step import DECODE, LYNX_BINS, PREFILL, UNITS


@dataclass(frozen=True)
class Ballot:
    """A step's votes."""

    slots: Tensor
    """bool `[num_tokens, top_k]`: slots that voted, those of prefill rows included."""
    active: Tensor
    """bool `[num_experts]`: the experts that stay active."""


@dataclass(frozen=True, kw_only=True)
class RoutedStep:
    """One step of one layer as the router left it. Shapes as in `sere.ops.reference.route_reference`."""

    weights: Tensor
    ids: Tensor
    """int64."""
    roles: Tensor
    scores: Tensor | None
    """None: not known, which only rules that need none can do with."""
    selection: Tensor | None
    num_experts: int

    @property
    def used(self) -> Tensor:
        return self.ids >= 0

    @property
    def decode(self) -> Tensor:
        """bool `[num_tokens, 1]`."""
        return (self.roles == DECODE).unsqueeze(1)

    @property
    def totals(self) -> Tensor:
        """Sum of each row's weights, float64 `[num_tokens, 1]`."""
        return self.weights.double().masked_fill(~self.used, 0).sum(1, keepdim=True)

    def ranks(self, keys: Tensor) -> Tensor:
        """Each slot's place in its row by descending key, the lowest slot first among equals, unused ones last; int64."""
        order = keys.masked_fill(~self.used, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        return torch.empty_like(order).scatter_(1, order, places)

    def per_expert(self, slots: Tensor) -> Tensor:
        """Which experts any of these slots has, bool `[num_experts]`."""
        # Other slots write to one expert past the last.
        target = torch.where(slots, self.ids, self.num_experts).flatten()
        hit = torch.zeros(self.num_experts + 1, dtype=torch.bool, device=self.ids.device)
        return hit.index_fill_(0, target, True)[: self.num_experts]

    def look_up(self, table: Tensor) -> Tensor:
        """A value per expert, by slot."""
        return table[self.ids.clamp(min=0)]


def cast_votes(votes: Votes, step: RoutedStep, tables: Mapping[str, Tensor]) -> Ballot:
    """Apply a vote rule to a step; prefill rows vote with all their experts, padding rows with none."""
    slots = _chosen(votes, step, tables)
    if votes.protect:
        slots = slots | step.look_up(tables["protected"] != 0)
    prefill = (step.roles == PREFILL).unsqueeze(1)
    slots = ((slots & step.decode) | prefill) & step.used
    return Ballot(slots, step.per_expert(slots))


def _chosen(votes: Votes, step: RoutedStep, tables: Mapping[str, Tensor]) -> Tensor:
    if votes.rule == "all":
        return step.used
    if votes.rule == "top":
        return _top(votes, step)
    weights = step.weights.double().masked_fill(~step.used, 0)
    if votes.rule == "share":
        share = tables["beta"].double() if votes.share is None else votes.share
        return weights >= share * weights.amax(1, keepdim=True)
    if votes.rule == "mass":
        ranks = step.ranks(step.weights)
        in_order = torch.zeros_like(weights).scatter_(1, ranks, weights)
        before = in_order.cumsum(1) - in_order
        return (ranks == 0) | (before < votes.mass * step.totals).gather(1, ranks)
    return step.look_up(_elected(votes, step, weights, tables))


def _top(votes: Votes, step: RoutedStep) -> Tensor:
    keys = step.weights
    if votes.order == "selection":
        assert step.selection is not None
        keys = step.selection.gather(1, step.ids.clamp(min=0))
    ranks, steps = step.ranks(keys), votes.steps()
    if len(steps) == 1 and steps[0][1] == math.floor(steps[0][1]):
        return ranks < math.floor(steps[0][1])
    num_rows = step.decode.sum()
    table = torch.tensor([top_k for _, top_k in steps], dtype=torch.float64, device=ranks.device)
    place = sum((num_rows >= least).long() for least, _ in steps[1:])
    top_k = table[place]
    whole = top_k.floor().long()
    is_next = (ranks == whole) & step.used & step.decode
    share = (step.weights.double() / step.totals).masked_fill(~is_next, 0).sum(1)
    share = torch.where(is_next.any(1) & (step.totals.squeeze(1) > 0), share, -1.0)
    # Rows that are not decode rows come last.
    share = share.masked_fill(~step.decode.squeeze(1), -2.0)
    order = share.sort(descending=True, stable=True).indices
    place_of_row = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    num_more = ((top_k - whole) * num_rows).round()
    return (ranks < whole) | (is_next & (place_of_row < num_more).unsqueeze(1))


def _elected(votes: Votes, step: RoutedStep, weights: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
    """The experts that decode rows elect together, bool `[num_experts]`."""
    voters = step.used & step.decode
    first_slots = (step.ranks(step.weights) == 0) & voters
    selected, firsts = step.per_expert(voters), step.per_expert(first_slots)
    winners = step.per_expert(first_slots & (weights > votes.winner * step.totals))
    shares = torch.where(step.totals > 0, weights / step.totals, 0)
    if votes.rule == "benefit":
        values = shares * step.look_up(tables["norms"].double())
        points = _sums(values * values * values, step, voters)
        return selected & (firsts | (points >= round(votes.benefit**3 * UNITS)))
    if votes.score == "probability":
        assert step.scores is not None
        points = (step.scores.double() * UNITS).round().long().masked_fill(~step.decode, 0).sum(0)
    elif votes.score == "lynx":
        points = _sums(_lynx(weights, step), step, voters)
    else:
        points = _sums(weights * step.look_up(tables["norms"].double()) if votes.score == "norm" else weights, step, voters)
    before = (firsts | winners) if votes.first else winners
    points = points.masked_fill(~selected, -1)
    order = points.sort(descending=True, stable=True).indices
    order = order[(before & selected)[order].to(torch.int8).sort(descending=True, stable=True).indices]
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return selected & (places < before.sum().clamp(min=votes.budget))


def _sums(values: Tensor, step: RoutedStep, voters: Tensor) -> Tensor:
    """Each expert's sum over rows in units of 1 / UNITS, int64 `[num_experts]`."""
    target = torch.where(voters, step.ids, step.num_experts).flatten()
    total = torch.zeros(step.num_experts + 1, dtype=torch.int64, device=values.device)
    return total.scatter_add_(0, target, (values * UNITS).round().long().flatten())[: step.num_experts]


def _lynx(weights: Tensor, step: RoutedStep) -> Tensor:
    """Number of decode rows to the power of the slot's bin; each further bin holds weights half as large."""
    first = weights.amax(1, keepdim=True)
    _, exponent = torch.frexp(torch.where(first > 0, weights / first, 0))
    bins = torch.where(weights > 0, LYNX_BINS - 2 + exponent, 0).clamp(min=0)
    return step.decode.sum().double().pow(bins) / UNITS
