"""Routers' scores: what a router ranks by, and whether a guess of it is told from a wrong one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.ops.policies.scoring import Scoring, reproduces
from tests.examples import examples
from tests.ops.strategies import scorings


def routed(scoring, logits, top_k, scale=1.0, renormalize=True):
    scores, selection = scoring.scores(logits)
    ids = selection.topk(top_k, dim=1, sorted=False).indices
    weights = scores.gather(1, ids)
    return scale * (weights / weights.sum(1, keepdim=True) if renormalize else weights), ids


@settings(max_examples=examples(60), deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1.0, 2.5]), renormalize=st.booleans())
def test_a_router_is_reproduced_whatever_it_does_to_its_weights(data, seed, scale, renormalize):
    generator = torch.Generator().manual_seed(seed)
    scoring = data.draw(scorings(64, generator))
    logits = torch.randn(32, 64, generator=generator)
    weights, ids = routed(scoring, logits, 6, scale, renormalize)
    assert reproduces(scoring, logits, weights, ids)
    assert not reproduces(scoring, logits, weights, ids.roll(1, 0)), "other experts"
    assert not reproduces(scoring, logits, weights * torch.rand(weights.shape, generator=generator), ids), "other weights"


@pytest.mark.parametrize(
    "wrong",
    [
        Scoring(function="softmax"),
        Scoring(function="sigmoid"),
        Scoring(function="sigmoid", bias=torch.linspace(-0.3, 0.3, 64)),
        Scoring(function="sigmoid", bias=torch.linspace(-0.3, 0.3, 64), num_groups=4, groups_kept=2),
    ],
)
def test_other_families_are_not(wrong):
    right = Scoring(function="sigmoid", bias=torch.linspace(-0.3, 0.3, 64), num_groups=4, groups_kept=2, group_score="top2")
    logits = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weights, ids = routed(right, logits, 8)
    assert reproduces(right, logits, weights, ids) and not reproduces(wrong, logits, weights, ids)


def test_groups():
    scoring = Scoring(function="sigmoid", num_groups=2, groups_kept=1, group_score="top2")
    logits = torch.tensor([[3.0, -3.0, 1.0, 1.0]])
    assert scoring.scores(logits)[1].isfinite().tolist() == [[False, False, True, True]]
    assert Scoring(function="sigmoid", num_groups=2, groups_kept=1).scores(logits)[1].isfinite().tolist() == [
        [True, True, False, False]
    ]


def test_unused_slots_and_repeated_experts_are_no_choice():
    scoring, logits = Scoring(function="softmax"), torch.tensor([[2.0, 1.0, 0.0]])
    weights = torch.tensor([[0.7, 0.3]])
    assert not reproduces(scoring, logits, weights, torch.tensor([[0, -1]]))
    assert not reproduces(scoring, logits, weights, torch.tensor([[0, 0]]))
