"""Hypothesis strategies for routing steps: what a router may return, and what a similarity matrix may hold."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor


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
