"""Every policy: what it may change, and what makes it the control it is."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings

from sere.conf.errors import ConfigError
from sere.conf.schema import PolicyName, RerouteConfig
from sere.ops.policies import POLICIES
from sere.ops.policies.base import LayerInfo
from sere.ops.reference import DECODE, reroute_reference
from tests.examples import examples
from tests.ops.strategies import Step, steps


def make(name, step=None, *, num_experts=None, top_k=None, renormalize=True, primary_top_k=1, threshold=0.0, seed=0, index=0):
    num_experts = num_experts or step.similarity.shape[0]
    layer = LayerInfo(
        index=index,
        num_experts=num_experts,
        top_k=top_k or step.topk_ids.shape[1],
        renormalize=renormalize,
        device=torch.device("cpu"),
    )
    config = RerouteConfig(policy=name, similarity="x", primary_top_k=primary_top_k, threshold=threshold, seed=seed)
    return POLICIES[name](config, layer, step.similarity if step is not None else None)


def all_roles(step: Step):
    return torch.full(step.topk_ids.shape[:1], DECODE, dtype=torch.int8) if step.roles is None else step.roles


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=examples(40), deadline=None)
@given(step=steps(max_tokens=40, max_experts=64))
def test_only_decode_rows_change_and_arguments_stay(name, step):
    roles = all_roles(step)
    weights_before, ids_before = step.topk_weights.clone(), step.topk_ids.clone()
    policy = make(name, step, primary_top_k=step.primary_top_k, threshold=step.threshold)
    logits = torch.zeros(step.topk_ids.shape[0], step.similarity.shape[0])
    weights, ids = policy.route(step.topk_weights, step.topk_ids, logits, roles)
    assert torch.equal(step.topk_weights, weights_before)
    assert torch.equal(step.topk_ids, ids_before)
    assert weights.shape == weights_before.shape and weights.dtype == weights_before.dtype
    assert ids.shape == ids_before.shape and ids.dtype == ids_before.dtype
    rest = roles != DECODE
    assert torch.equal(weights[rest], weights_before[rest])
    assert torch.equal(ids[rest], ids_before[rest])
    assert torch.equal(ids < 0, ids_before < 0)


@pytest.mark.parametrize("name", ["none", "sere", "random", "top_k"])
@settings(max_examples=examples(20), deadline=None)
@given(step=steps(max_tokens=20, max_experts=32))
def test_primary_top_k_equal_to_top_k_changes_nothing(name, step):
    policy = make(name, step, primary_top_k=step.topk_ids.shape[1])
    weights, ids = policy.route(step.topk_weights, step.topk_ids, torch.zeros(1), all_roles(step))
    assert torch.equal(ids, step.topk_ids)
    assert torch.equal(weights, step.topk_weights)


@settings(max_examples=examples(40), deadline=None)
@given(step=steps(max_tokens=40, max_experts=64))
def test_sere_is_the_reference(step):
    policy = make("sere", step, primary_top_k=step.primary_top_k, threshold=step.threshold)
    _, ids = policy.route(step.topk_weights, step.topk_ids, torch.zeros(1), all_roles(step))
    expected = reroute_reference(
        step.topk_weights,
        step.topk_ids,
        step.similarity,
        primary_top_k=step.primary_top_k,
        threshold=step.threshold,
        roles=all_roles(step),
    )
    assert torch.equal(ids, expected)


def test_random_is_seeded_and_differs_per_layer_and_seed():
    ids = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(i))[:8] for i in range(16)])
    weights = torch.rand(16, 8)
    roles = torch.full((16,), DECODE, dtype=torch.int8)

    def routed(**kwargs):
        return make("random", num_experts=64, top_k=8, **kwargs).route(weights, ids, torch.zeros(1), roles)[1]

    assert torch.equal(routed(), routed())
    assert not torch.equal(routed(), routed(seed=1))
    assert not torch.equal(routed(), routed(index=1))


def test_random_replacement_is_uniform():
    weights, ids = torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([[0, 2], [1, 2]])
    roles = torch.full((2,), DECODE, dtype=torch.int8)
    chosen = [
        int(make("random", num_experts=3, top_k=2, seed=seed).route(weights, ids, torch.zeros(1), roles)[1][0, 1])
        for seed in range(400)
    ]
    assert set(chosen) == {0, 1}
    assert 150 < sum(chosen) < 250


def test_top_k_drops_and_renormalizes():
    weights, ids = torch.tensor([[0.1, 0.6, 0.3]]), torch.tensor([[5, 7, 2]])
    roles = torch.tensor([DECODE], dtype=torch.int8)
    kwargs = dict(num_experts=8, top_k=3, primary_top_k=2)
    new_weights, new_ids = make("top_k", **kwargs).route(weights, ids, torch.zeros(1), roles)
    assert new_ids.tolist() == [[7, 7, 2]]
    torch.testing.assert_close(new_weights, torch.tensor([[0.0, 0.6 / 0.9, 0.3 / 0.9]]))
    plain, _ = make("top_k", renormalize=False, **kwargs).route(weights, ids, torch.zeros(1), roles)
    torch.testing.assert_close(plain, torch.tensor([[0.0, 0.6, 0.3]]))


def test_primary_top_k_above_top_k_is_refused():
    with pytest.raises(ConfigError, match=r"between 1 and the model's top_k \(8\), got 9"):
        make("random", num_experts=64, top_k=8, primary_top_k=9)


def test_top_k_needs_to_know_whether_weights_are_renormalized():
    with pytest.raises(ConfigError, match="cannot tell whether the router of layer 3 renormalises"):
        make("top_k", num_experts=8, top_k=3, index=3, renormalize=None)
    make("random", num_experts=8, top_k=3, renormalize=None)


def test_table_of_policies():
    assert set(POLICIES) == set(get_args(PolicyName))
    assert len({POLICIES[name] for name in POLICIES}) == len(POLICIES)
    assert "top_k" in POLICIES and "topk" not in POLICIES
    with pytest.raises(ConfigError, match="unknown policy 'topk': valid are none, sere, top_k, random"):
        POLICIES["topk"]
    with pytest.raises(TypeError):
        POLICIES["mine"] = POLICIES["none"]
