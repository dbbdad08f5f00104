"""The rules of `reference.py`, one by one: how a step's rows vote, where slots go, and with which weights."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from sere.conf.schema.rules import Rules, Votes

PADDING, PREFILL, DECODE = 0, 1, 2
UNITS = 2.0**32
"""Sums over rows are taken in whole numbers of 1 / UNITS, so that their order does not matter."""
LYNX_BINS = 4
"""Ours: LYNX's constants are unpublished."""


class Step:
    """One step of one layer on its way through a policy."""

    def __init__(self, topk_weights: Tensor, topk_ids: Tensor, roles: Tensor | None) -> None:
        self._like = topk_weights, topk_ids
        self.weights: list[list[float]] = topk_weights.tolist()
        self.ids: list[list[int]] = topk_ids.tolist()
        self.new_weights = [list(row) for row in self.weights]
        self.new_ids = [list(row) for row in self.ids]
        self.roles: list[int] = [DECODE] * len(self.ids) if roles is None else roles.tolist()
        self.decode_rows = [row for row, role in enumerate(self.roles) if role == DECODE]
        self.active: set[int] = set()
        self.votes: dict[int, set[int]] = {}
        """Slots that voted, by decode row."""
        self.moved: dict[int, set[int]] = {row: set() for row in self.decode_rows}
        """Slots that have another expert than before."""

    def used(self, row: int) -> list[int]:
        return [slot for slot, expert in enumerate(self.ids[row]) if expert >= 0]

    def ranked(self, row: int) -> list[int]:
        return sorted(self.used(row), key=lambda slot: (-self.weights[row][slot], slot))

    def total(self, row: int) -> float:
        return math.fsum(self.weights[row][slot] for slot in self.used(row))

    def vote_for(self, choose: Callable[[int], Iterable[int]]) -> None:
        for row, role in enumerate(self.roles):
            if role == DECODE:
                self.votes[row] = set(choose(row))
            voting = self.votes[row] if role == DECODE else self.used(row) if role == PREFILL else ()
            self.active.update(self.ids[row][slot] for slot in voting)

    def move_to_similar(self, similarity: Tensor, threshold: float) -> None:
        """SERE's steps 2 and 3."""
        least = torch.tensor(threshold, dtype=torch.float32)
        candidates = sorted(self.active)
        replacement: dict[int, int] = {}
        for row in self.decode_rows:
            for slot in self.used(row):
                expert = self.ids[row][slot]
                if expert in self.active or not candidates:
                    continue
                if expert not in replacement:
                    # argmax returns the first maximum: the lowest expert id, since candidates ascend.
                    most_similar = candidates[int(similarity[expert, candidates].argmax())]
                    replacement[expert] = most_similar if similarity[expert, most_similar] >= least else expert
                if replacement[expert] != expert:
                    self.new_ids[row][slot] = replacement[expert]
                    self.moved[row].add(slot)

    def move_to_own(self, scores: Tensor, selection: Tensor) -> None:
        """The row's voted experts, then the best others of A by finite selection score, up to its number of slots (OEA). A slot
        whose expert stays keeps it; the others take the new ones, best first. The weight of an expert is p W / P."""
        for row in self.decode_rows:
            used = self.used(row)
            experts = [self.ids[row][slot] for slot in self.votes[row]]
            sel = selection[row].tolist()
            others = [expert for expert in self.active if expert not in experts and math.isfinite(sel[expert])]
            others.sort(key=lambda expert: (-sel[expert], expert))
            chosen = experts + others[: len(used) - len(experts)]
            arriving = [expert for expert in chosen if expert not in self.ids[row]]
            arriving.sort(key=lambda expert: (-sel[expert], expert))
            selected = math.fsum(scores[row, self.ids[row][slot]].item() for slot in used)
            scale = self.total(row) / selected if selected > 0 else 0.0
            for slot in used:
                if self.ids[row][slot] in chosen:
                    continue
                self.moved[row].add(slot)
                if arriving:
                    expert = self.new_ids[row][slot] = arriving.pop(0)
                    self.new_weights[row][slot] = scores[row, expert].item() * scale
                else:
                    self._empty(row, slot)

    def drop(self, *, unvoted: bool) -> None:
        """Slots whose expert is not active, or, with `unvoted`, all that their own row did not vote for."""
        for row in self.decode_rows:
            for slot in self.used(row):
                if slot not in self.votes[row] if unvoted else self.ids[row][slot] not in self.active:
                    self.moved[row].add(slot)
                    self._empty(row, slot)

    def _empty(self, row: int, slot: int) -> None:
        """A slot that is not used any more: weight 0, and an expert that is active anyway, the row's first that stays."""
        staying = [other for other in self.ranked(row) if self.ids[row][other] in self.active]
        self.new_ids[row][slot] = self.ids[row][staying[0]] if staying else min(self.active)
        self.new_weights[row][slot] = 0.0

    def result(self) -> tuple[Tensor, Tensor]:
        weights, ids = self._like
        return (
            torch.tensor(self.new_weights, dtype=weights.dtype, device=weights.device).reshape(weights.shape),
            torch.tensor(self.new_ids, dtype=ids.dtype, device=ids.device).reshape(ids.shape),
        )


def vote(step: Step, votes: Votes, scores: Tensor, selection: Tensor, tables: Mapping[str, Tensor]) -> None:
    """Who is active: each rule's own definition, then protected experts, where rows selected them."""
    weights, ids = step.weights, step.ids
    chosen: dict[int, set[int]]
    match votes.rule:
        case "all":
            chosen = {row: set(step.used(row)) for row in step.decode_rows}
        case "top":
            chosen = _top(step, votes, selection)
        case "mass":
            chosen = {}
            for row in step.decode_rows:
                order, total = step.ranked(row), step.total(row)
                size = next(
                    (n for n in range(1, len(order)) if math.fsum(weights[row][s] for s in order[:n]) >= votes.mass * total),
                    len(order),
                )
                chosen[row] = set(order[:size])
        case "share":
            share = tables["beta"].item() if votes.share is None else votes.share
            chosen = {}
            for row in step.decode_rows:
                largest = max((weights[row][slot] for slot in step.used(row)), default=0.0)
                chosen[row] = {slot for slot in step.used(row) if weights[row][slot] >= share * largest}
        case _:
            elected = _elected(step, votes, scores, tables)
            chosen = {row: {slot for slot in step.used(row) if ids[row][slot] in elected} for row in step.decode_rows}
    if votes.protect:
        for row, slots in chosen.items():
            slots.update(slot for slot in step.used(row) if tables["protected"][ids[row][slot]])
    step.vote_for(chosen.__getitem__)


def _top(step: Step, votes: Votes, selection: Tensor) -> dict[int, set[int]]:
    """Each row's best S slots; of a fraction, the rows whose next slot has the largest share vote once more."""
    fewest, rows = votes.steps()[0], step.decode_rows
    top_k = next((s for least, s in reversed(votes.steps()) if len(rows) >= least), fewest[1])
    whole = math.floor(top_k)

    def ranked(row: int) -> list[int]:
        if votes.order == "weight":
            return step.ranked(row)
        return sorted(step.used(row), key=lambda slot: (-selection[row, step.ids[row][slot]].item(), slot))

    def next_share(row: int) -> float:
        order, total = ranked(row), step.total(row)
        return step.weights[row][order[whole]] / total if len(order) > whole and total > 0 else -1.0

    num_more = round((top_k - whole) * len(rows))
    more = sorted(rows, key=lambda row: (-next_share(row), row))[:num_more]
    return {row: set(ranked(row)[: whole + (row in more)]) for row in rows}


def _elected(step: Step, votes: Votes, scores: Tensor, tables: Mapping[str, Tensor]) -> set[int]:
    """The experts that decode rows elect together: rules `benefit` and `budget`."""
    norms = tables["norms"].tolist() if "norms" in tables else []
    points: dict[int, int] = {}
    firsts: set[int] = set()
    winners: set[int] = set()
    for row in step.decode_rows:
        order, total = step.ranked(row), step.total(row)
        if order:
            firsts.add(step.ids[row][order[0]])
            if step.weights[row][order[0]] > votes.winner * total:
                winners.add(step.ids[row][order[0]])
        for slot in order:
            expert, weight = step.ids[row][slot], step.weights[row][slot]
            share = weight / total if total > 0 else 0.0
            if votes.rule == "benefit":
                value = share * norms[expert]
                value = value * value * value
            elif votes.score == "lynx":
                first = step.weights[row][order[0]]
                # The first bin holds the row's largest weights, each further one weights half as large.
                halvings = math.frexp(weight / first)[1] - 1 if weight > 0 else -LYNX_BINS
                value = float(len(step.decode_rows) ** max(0, LYNX_BINS - 1 + halvings)) / UNITS
            else:
                value = {"probability": 0.0, "weight": weight, "norm": weight * (norms[expert] if norms else 0)}[votes.score]
            points[expert] = points.get(expert, 0) + round(value * UNITS)
    if votes.rule == "benefit":
        return firsts | {expert for expert, value in points.items() if value >= round(votes.benefit**3 * UNITS)}
    if votes.score == "probability":
        points = {expert: sum(round(scores[row, expert].item() * UNITS) for row in step.decode_rows) for expert in points}
    before = (firsts if votes.first else set()) | winners
    order = sorted(points, key=lambda expert: (expert not in before, -points[expert], expert))
    return set(order[: max(votes.budget, len(before))])


def weigh(step: Step, rules: Rules, tables: Mapping[str, Tensor], renormalize: bool) -> None:
    """The new slots' weights from their base weights."""
    rule = rules.weights
    if rule == "router":
        rule = "renormalize" if renormalize else "keep"
    for row in step.decode_rows:
        new = step.new_weights[row]
        if rule == "fold":
            for slot in step.moved[row]:
                new[slot] = tables["folds"][step.ids[row][slot], step.new_ids[row][slot]].item() * step.weights[row][slot]
        if rule not in ("renormalize", "half") or not step.moved[row]:
            continue
        base = math.fsum(new[slot] for slot in step.used(row))
        ratio = step.total(row) / base if base > 0 else 0.0
        scale = ratio if rule == "renormalize" else math.sqrt(ratio)
        for slot in step.used(row):
            new[slot] *= scale
