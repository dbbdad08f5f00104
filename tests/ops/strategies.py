"""Hypothesis strategies for routing steps: what a router may return, and what a similarity matrix may hold."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from sere.conf.schema import RerouteConfig
from sere.ops.policies.policy import LayerInfo, Policy
from sere.ops.policies.scoring import Scoring
from sere.ops.reference import route_reference


@dataclass(frozen=True)
class Step:
    """One drawn step. Shapes as in `sere.ops.reference.reroute_reference`."""

    topk_weights: Tensor
    topk_ids: Tensor
    similarity: Tensor
    roles: Tensor | None
    primary_top_k: int
    threshold: float


@st.composite
def steps(draw: st.DrawFn, max_tokens: int = 300, max_experts: int = 512, max_top_k: int = 16) -> Step:
    """Steps with unsorted slots, equal weights, duplicate similarities, unused slots, both id types, and empty batches."""
    num_tokens = draw(st.integers(0, max_tokens))
    num_experts = draw(st.integers(1, max_experts))
    top_k = draw(st.integers(1, min(max_top_k, num_experts)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    ids = scores.topk(top_k, dim=1, sorted=False).indices if num_tokens else torch.empty(0, top_k, dtype=torch.long)
    weights = torch.rand(num_tokens, top_k, generator=generator)
    if draw(st.booleans()):
        # Few distinct values: ties between slots.
        weights = (weights * draw(st.integers(1, 4))).round()
    similarity = torch.rand(num_experts, num_experts, generator=generator)
    levels = draw(st.sampled_from([0, 1, 3, 10]))
    if levels:
        similarity = (similarity * levels).round() / levels
    similarity = torch.maximum(similarity, similarity.T).fill_diagonal_(1)
    if draw(st.booleans()):
        ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -1)
    roles = None
    if draw(st.booleans()):
        roles = torch.randint(0, 3, (num_tokens,), generator=generator, dtype=torch.int8)
    return Step(
        topk_weights=weights,
        topk_ids=ids.to(draw(st.sampled_from([torch.int32, torch.int64]))),
        similarity=similarity,
        roles=roles,
        primary_top_k=draw(st.integers(1, top_k)),
        # Values of the matrix itself test that equality re-routes.
        threshold=draw(st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 0.7, 1.0]) | st.floats(0, 1)),
    )


@dataclass(frozen=True)
class PolicyStep:
    """One drawn step of a drawn router, under drawn rules. Shapes as in `sere.ops.reference.route_reference`."""

    reroute: RerouteConfig
    topk_weights: Tensor
    topk_ids: Tensor
    logits: Tensor
    scoring: Scoring
    tables: dict[str, Tensor]
    roles: Tensor
    renormalize: bool
    layer: int = 3

    @property
    def num_experts(self) -> int:
        return self.logits.shape[1]

    def info(self, device: str = "cpu") -> LayerInfo:
        return LayerInfo(
            index=self.layer,
            num_experts=self.num_experts,
            top_k=self.topk_ids.shape[1],
            renormalize=self.renormalize,
            device=torch.device(device),
            scoring=self.scoring,
        )

    def policy(self) -> Policy:
        return Policy(self.reroute, self.info(), self.tables)

    def expected(self) -> tuple[Tensor, Tensor]:
        """What the reference says."""
        scores, selection = self.scoring.scores(self.logits)
        return route_reference(
            self.reroute,
            self.topk_weights,
            self.topk_ids,
            scores,
            selection=selection,
            tables=self.tables,
            roles=self.roles,
            layer=self.layer,
            renormalize=self.renormalize,
        )


@st.composite
def scorings(draw: st.DrawFn, num_experts: int, generator: torch.Generator) -> Scoring:
    """Routers' ways of scoring: softmax, sigmoid, with a bias, in groups."""
    bias = torch.randn(num_experts, generator=generator) * 0.1 if draw(st.booleans()) else None
    groups = 4 if num_experts % 8 == 0 and draw(st.booleans()) else 1
    return Scoring(
        function=draw(st.sampled_from(["softmax", "sigmoid"])),
        bias=bias,
        num_groups=groups,
        groups_kept=draw(st.integers(1, 3)) if groups > 1 else 1,
        group_score=draw(st.sampled_from(["max", "top2"])),
    )


@st.composite
def vote_rules(draw: st.DrawFn, top_k: int, num_experts: int) -> dict[str, object]:
    """Settings of `votes` that fit a layer."""
    rule = draw(st.sampled_from(["all", "top", "top", "mass", "share", "benefit", "budget"]))
    votes: dict[str, object] = {"rule": rule, "protect": draw(st.booleans())}
    steps = st.integers(1, top_k) | st.floats(1, top_k, width=16)
    if rule == "top":
        votes["order"] = draw(st.sampled_from(["weight", "selection"]))
        if draw(st.booleans()):
            votes["by_batch"] = {1: draw(steps), 5: draw(steps), 12: draw(steps)}
        else:
            votes["primary_top_k"] = draw(steps)
    elif rule in ("mass", "share"):
        # 0.3 as well, which is no float32; null: the layer's own.
        votes[rule] = draw(st.sampled_from([0.05, 0.3, 0.5, 0.9, 1.0] + [None] * (rule == "share")))
    elif rule == "benefit":
        votes["benefit"] = draw(st.sampled_from([0.1, 0.3, 0.5, 1.0]))
    elif rule == "budget":
        votes |= {
            "budget": draw(st.integers(1, num_experts)),
            "score": draw(st.sampled_from(["probability", "weight", "norm", "lynx"])),
            "first": draw(st.booleans()),
            "winner": draw(st.sampled_from([0.3, 1.0])),
        }
    return votes


@st.composite
def policy_steps(
    draw: st.DrawFn, max_tokens: int = 40, max_experts: int = 64, max_top_k: int = 8, votes: dict[str, object] | None = None
) -> PolicyStep:
    """Steps as routers of every family leave them, under every combination of rules."""
    num_experts = draw(st.sampled_from([size for size in (1, 2, 5, 16, 33, 64, 128, 256, 512) if size <= max_experts]))
    num_tokens = draw(st.integers(0, max_tokens))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    scoring = draw(scorings(num_experts, generator))
    choosable = num_experts // scoring.num_groups * min(scoring.groups_kept, scoring.num_groups)
    top_k = draw(st.integers(1, min(max_top_k, choosable)))
    logits = torch.randn(num_tokens, num_experts, generator=generator) * draw(st.sampled_from([0.5, 2.0]))
    scores, selection = scoring.scores(logits)
    ids = selection.topk(top_k, dim=1, sorted=draw(st.booleans())).indices
    weights = scores.gather(1, ids)
    renormalize = draw(st.booleans())
    if renormalize:
        weights = weights / weights.sum(1, keepdim=True)
    weights = weights * draw(st.sampled_from([1.0, 2.5]))
    if draw(st.booleans()):
        ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.15, -1)
    everyone = torch.full((num_tokens,), 2, dtype=torch.int8)
    roles = torch.randint(0, 3, (num_tokens,), generator=generator, dtype=torch.int8) if draw(st.booleans()) else everyone
    matrix = torch.rand(num_experts, num_experts, generator=generator)
    tables = {
        "cosine": ((matrix + matrix.T) / 2).fill_diagonal_(1),
        "norms": torch.rand(num_experts, generator=generator) + 0.5,
        "protected": (torch.rand(num_experts, generator=generator) < 0.1).to(torch.uint8),
        "beta": torch.rand(1, generator=generator),
        "folds": torch.randn(num_experts, num_experts, generator=generator),
        "fold_losses": torch.rand(num_experts, num_experts, generator=generator).fill_diagonal_(0),
    }
    target = draw(st.sampled_from(["similar", "own", "own", "random", "least_loss", "drop", "drop_unvoted"]))
    rules = draw(vote_rules(top_k, num_experts)) if votes is None else votes
    if target in ("drop", "drop_unvoted") and rules["rule"] == "budget":
        rules = {**rules, "first": True}
    weight_rules = ["keep", "renormalize", "half", "router"] + ["fold"] * (target == "least_loss")
    targets: dict[str, object] = {"rule": target}
    if target == "similar":
        targets["threshold"] = draw(st.sampled_from([0.0, 0.3, 0.5, 0.7]))
    return PolicyStep(
        reroute=RerouteConfig(
            policy="oea", similarity="x", votes=rules, targets=targets, weights=draw(st.sampled_from(weight_rules))
        ),
        topk_weights=weights,
        topk_ids=ids.to(draw(st.sampled_from([torch.int32, torch.int64]))),
        logits=logits,
        scoring=scoring,
        tables=tables,
        roles=roles,
        renormalize=renormalize,
    )
