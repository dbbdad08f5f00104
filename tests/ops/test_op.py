"""The custom op equals the reference exactly, on drawn steps."""

import pytest
import torch
from hypothesis import given, settings

from sere.ops import reroute_topk
from sere.ops.kernels.cpu import reroute_in_torch
from sere.ops.kernels.votes import primary_experts, voting_slots
from sere.ops.reference import reroute_reference
from tests.examples import examples
from tests.ops.strategies import Step, steps


@settings(max_examples=examples(300), deadline=None)
@given(steps())
def test_equals_reference(step: Step):
    arguments = dict(primary_top_k=step.primary_top_k, threshold=step.threshold, roles=step.roles)
    weights, ids = step.topk_weights.clone(), step.topk_ids.clone()
    expected = reroute_reference(step.topk_weights, step.topk_ids, step.similarity, **arguments)
    actual = reroute_topk(step.topk_weights, step.topk_ids, step.similarity, **arguments)
    assert actual.dtype == step.topk_ids.dtype
    assert torch.equal(actual, expected)
    assert torch.equal(step.topk_weights, weights)
    assert torch.equal(step.topk_ids, ids), "the arguments must not change"


@settings(max_examples=examples(100), deadline=None)
@given(steps(max_tokens=100, max_experts=64))
def test_without_compiled_code_it_equals_the_reference(step: Step):
    arguments = dict(primary_top_k=step.primary_top_k, threshold=step.threshold, roles=step.roles)
    expected = reroute_reference(step.topk_weights, step.topk_ids, step.similarity, **arguments)
    assert torch.equal(reroute_in_torch(step.topk_weights, step.topk_ids, step.similarity, **arguments), expected)


def test_similarity_may_change_and_may_be_made_in_inference_mode():
    """Neighbours are sorted once per matrix, and must not outlive what they were sorted from."""
    weights, ids = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]), torch.tensor([[0, 3], [1, 3], [2, 3]])
    similarity = torch.eye(4)
    for best in (2, 0, 1):
        similarity[3, :3] = 0.6
        similarity[3, best] = 0.9
        assert reroute_topk(weights, ids, similarity, primary_top_k=1, threshold=0.5)[:, 1].tolist() == [best] * 3
    with torch.inference_mode():
        similarity = similarity.clone()
        for best in (2, 0):
            similarity[3, :3] = 0.6
            similarity[3, best] = 0.9
            assert reroute_topk(weights, ids, similarity, primary_top_k=1, threshold=0.5)[:, 1].tolist() == [best] * 3


@settings(max_examples=examples(50), deadline=None)
@given(steps(max_tokens=40, max_experts=40))
def test_result_is_router_choice_or_primary(step: Step):
    result = reroute_topk(
        step.topk_weights,
        step.topk_ids,
        step.similarity,
        primary_top_k=step.primary_top_k,
        threshold=step.threshold,
        roles=step.roles,
    )
    num_experts = step.similarity.shape[0]
    votes = voting_slots(step.topk_weights, step.topk_ids, step.primary_top_k, step.roles)
    primary = primary_experts(step.topk_ids, votes, num_experts)
    changed = result != step.topk_ids
    assert primary[result[changed].long()].all()
    assert not (changed & votes).any()
    assert result.unique().numel() <= step.topk_ids.unique().numel()


def test_registered_as_torch_requires():
    arguments = (torch.rand(5, 3), torch.randint(0, 8, (5, 3), dtype=torch.int32), torch.rand(8, 8), 1, 0.5, None)
    torch.library.opcheck(torch.ops.sere.reroute_topk.default, arguments)


def test_survives_torch_compile():
    weights, ids, similarity = torch.rand(6, 4), torch.randint(0, 16, (6, 4)), torch.rand(16, 16)

    def step(weights, ids):
        return reroute_topk(weights, ids, similarity, primary_top_k=1, threshold=0.2) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weights, ids), step(weights, ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(topk_weights=torch.rand(4, 2)), "must both be"),
        (dict(topk_ids=torch.zeros(4, 3, dtype=torch.int16)), "int32 or int64"),
        (dict(similarity=torch.rand(8, 7)), "num_experts, num_experts"),
        (dict(similarity=torch.rand(8, 8, dtype=torch.float64)), "float32"),
        (dict(roles=torch.zeros(3, dtype=torch.int8)), r"int8 \[4\]"),
        (dict(primary_top_k=0), "at least 1"),
    ],
)
def test_refuses_arguments_that_do_not_fit(change, message):
    arguments = dict(
        topk_weights=torch.rand(4, 3),
        topk_ids=torch.zeros(4, 3, dtype=torch.int64),
        similarity=torch.rand(8, 8),
        primary_top_k=1,
        threshold=0.5,
        roles=None,
    )
    with pytest.raises(ValueError, match=message):
        reroute_topk(**{**arguments, **change})
