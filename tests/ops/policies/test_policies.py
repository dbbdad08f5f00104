"""Every policy: the torch operations against the reference, and what makes each rule what it is."""

import dataclasses
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.conf.errors import ConfigError
from sere.conf.schema import RerouteConfig
from sere.conf.schema.named import NAMED, PolicyName
from sere.ops.policies.policy import LayerInfo, Policy
from sere.ops.policies.scoring import Scoring
from sere.ops.policies.weights import difference_of
from sere.ops.reference import DECODE, reroute_reference, route_reference
from tests.examples import examples
from tests.ops.strategies import PolicyStep, Step, policy_steps, steps

SOFTMAX = Scoring(function="softmax")


def make(name, *, num_experts=64, top_k=8, renormalize=True, index=0, scoring=SOFTMAX, tables=None, **settings):
    layer = LayerInfo(
        index=index,
        num_experts=num_experts,
        top_k=top_k,
        renormalize=renormalize,
        device=torch.device("cpu"),
        scoring=scoring,
    )
    return Policy(RerouteConfig(policy=name, similarity="x", **settings), layer, tables)


def all_roles(step: Step):
    return torch.full(step.topk_ids.shape[:1], DECODE, dtype=torch.int8) if step.roles is None else step.roles


def dense(weights, ids, num_experts):
    """Weight by expert, `[num_tokens, num_experts]`: what a layer computes with."""
    total = torch.zeros(len(ids), num_experts + 1, dtype=torch.float64)
    target = torch.where(ids >= 0, ids.long(), num_experts)
    return total.scatter_add_(1, target, weights.double())[:, :num_experts]


@settings(max_examples=examples(300), deadline=None)
@given(step=policy_steps())
def test_equals_the_reference(step: PolicyStep):
    before = step.topk_weights.clone(), step.topk_ids.clone()
    weights, ids = step.policy().route(step.topk_weights, step.topk_ids, step.logits, step.roles)
    expected_weights, expected_ids = step.expected()
    assert torch.equal(ids, expected_ids) and ids.dtype == step.topk_ids.dtype
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=0)
    assert torch.equal(step.topk_weights, before[0]) and torch.equal(step.topk_ids, before[1])


@settings(max_examples=examples(150), deadline=None)
@given(step=policy_steps(), name=st.sampled_from(sorted(NAMED)), data=st.data())
def test_every_name_equals_the_reference(step: PolicyStep, name, data):
    votes = {"budget": data.draw(st.integers(1, step.num_experts))} if NAMED[name].votes["rule"] == "budget" else {}
    top_k = data.draw(st.integers(1, step.topk_ids.shape[1]))
    reroute = RerouteConfig(
        policy=name, similarity="x", votes=votes, primary_top_k=top_k, threshold=0.0, compensation={"rule": "none"}
    )
    named = dataclasses.replace(step, reroute=reroute)
    weights, ids = named.policy().route(step.topk_weights, step.topk_ids, step.logits, step.roles)
    expected_weights, expected_ids = named.expected()
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=0)


def test_scores_are_read_to_rank_by_only_where_there_is_a_bias():
    biased = Scoring(function="sigmoid", bias=torch.linspace(-1, 1, 64))
    assert make("oea", scoring=biased).rules.votes.order == "selection"
    assert make("oea").rules.votes.order == "weight"


@settings(max_examples=examples(200), deadline=None)
@given(step=policy_steps())
def test_what_holds_for_every_policy(step: PolicyStep):
    weights, ids = step.policy().route(step.topk_weights, step.topk_ids, step.logits, step.roles)
    rest = step.roles != DECODE
    assert torch.equal(weights[rest], step.topk_weights[rest]) and torch.equal(ids[rest], step.topk_ids[rest])
    assert torch.equal(ids < 0, step.topk_ids < 0)
    assert torch.equal(weights[ids < 0], step.topk_weights[ids < 0])
    assert weights.isfinite().all()
    used = ids >= 0
    sums = [(w.double() * used).sum(1) for w in (step.topk_weights, weights)]
    rules = step.reroute.rules(step.layer)
    rule = ("renormalize" if step.renormalize else "keep") if rules.weights == "router" else rules.weights
    if rule == "renormalize":
        has_any = ((weights != 0) & used).any(1)
        torch.testing.assert_close(sums[1][has_any], sums[0][has_any], rtol=1e-5, atol=1e-7)
    elif rule == "keep" and rules.targets.rule in ("similar", "random", "least_loss"):
        assert torch.equal(weights, step.topk_weights)
    elif rule == "keep" and rules.targets.rule in ("drop", "drop_unvoted"):
        assert (sums[1] <= sums[0] + 1e-6).all()


@settings(max_examples=examples(100), deadline=None)
@given(step=policy_steps(votes={"rule": "all"}))
def test_where_all_slots_vote_nothing_changes(step: PolicyStep):
    weights, ids = step.policy().route(step.topk_weights, step.topk_ids, step.logits, step.roles)
    assert torch.equal(weights, step.topk_weights) and torch.equal(ids, step.topk_ids)
    # By the rules themselves, too, not only by the short way out.
    everyone = {"rule": "top", "primary_top_k": step.topk_ids.shape[1]}
    config = RerouteConfig(policy="oea", similarity="x", votes=everyone, targets=step.reroute.targets, weights="keep")
    scores, selection = step.scoring.scores(step.logits)
    weights, ids = route_reference(
        config, step.topk_weights, step.topk_ids, scores, selection=selection, tables=step.tables, roles=step.roles
    )
    n = step.num_experts
    torch.testing.assert_close(dense(weights, ids, n), dense(step.topk_weights, step.topk_ids, n), rtol=1e-6, atol=1e-9)


@settings(max_examples=examples(200), deadline=None)
@given(step=policy_steps())
def test_own_keeps_voted_experts_repeats_none_and_fills_up(step: PolicyStep):
    config = RerouteConfig(policy="oea", similarity="x", votes=step.reroute.votes, targets={"rule": "own"}, weights="keep")
    policy = Policy(config, step.info(), step.tables)
    weights, ids = policy.route(step.topk_weights, step.topk_ids, step.logits, step.roles)
    _, selection = step.scoring.scores(step.logits)
    ballot = policy._route(policy._step(step.topk_weights, step.topk_ids, step.logits, step.roles))[2]
    for row in (step.roles == DECODE).nonzero().flatten().tolist():
        before = [e for e in step.topk_ids[row].tolist() if e >= 0]
        after = [e for w, e in zip(weights[row].tolist(), ids[row].tolist(), strict=True) if e >= 0 and w > 0]
        assert len(set(after)) == len(after)
        assert all(ballot[e] for e in after)
        reachable = {e for e in ballot.nonzero().flatten().tolist() if selection[row, e].isfinite()} | set(before)
        assert len({e for e in ids[row].tolist() if e >= 0}) >= min(len(before), len(reachable & set(_active(ballot))))


def _active(ballot):
    return ballot.nonzero().flatten().tolist()


@settings(max_examples=examples(60), deadline=None)
@given(
    step=policy_steps(votes={"rule": "budget", "budget": 64, "first": True}),
)
def test_a_budget_above_the_union_changes_nothing(step: PolicyStep):
    votes = {"budget": step.num_experts}
    policy = Policy(RerouteConfig(policy="xshare", votes=votes), step.info())
    weights, ids = policy.route(step.topk_weights, step.topk_ids, step.logits, step.roles)
    assert torch.equal(weights, step.topk_weights) and torch.equal(ids, step.topk_ids)


@settings(max_examples=examples(60), deadline=None)
@given(step=policy_steps())
def test_difference_is_what_each_expert_lost(step: PolicyStep):
    policy = step.policy()
    buffer = torch.full((len(step.topk_ids) + 2, step.num_experts), 7.0)
    weights, ids = policy.route_and_count(step.topk_weights, step.topk_ids, step.logits, step.roles, difference=buffer)
    n = step.num_experts
    lost = dense(step.topk_weights, step.topk_ids, n) - dense(weights, ids, n)
    lost[step.roles != DECODE] = 0
    torch.testing.assert_close(buffer[: len(ids)].double(), lost, rtol=1e-5, atol=1e-6)
    assert (buffer[len(ids) :] == 7).all()
    routed = policy._step(step.topk_weights, step.topk_ids, step.logits, step.roles)
    torch.testing.assert_close(difference_of(routed, weights, ids.long()).double(), lost, rtol=1e-5, atol=1e-6)


@settings(max_examples=examples(40), deadline=None)
@given(step=steps(max_tokens=40, max_experts=64))
def test_sere_is_its_own_reference(step):
    size = dict(num_experts=step.similarity.shape[0], top_k=step.topk_ids.shape[1])
    policy = make(
        "sere", tables={"cosine": step.similarity}, primary_top_k=step.primary_top_k, threshold=step.threshold, **size
    )
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
        return make("random", primary_top_k=1, **kwargs).route(weights, ids, torch.zeros(1), roles)[1]

    assert torch.equal(routed(), routed())
    assert not torch.equal(routed(), routed(seed=1))
    assert not torch.equal(routed(), routed(index=1))


def test_random_replacement_is_uniform():
    weights, ids = torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([[0, 2], [1, 2]])
    roles = torch.full((2,), DECODE, dtype=torch.int8)
    chosen = [
        int(
            make("random", num_experts=3, top_k=2, primary_top_k=1, seed=seed).route(weights, ids, torch.zeros(1), roles)[1][
                0, 1
            ]
        )
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(name="random", primary_top_k=9), r"between 1 and the model's top_k \(8\), got 9"),
        (dict(name="top_k", index=3, renormalize=None), "cannot tell whether the router of layer 3 renormalises"),
        (dict(name="oea", index=3, scoring=None), "needs the router's scores of all experts, .* layer 3 .* use policy 'sere'"),
        (dict(name="sere"), "needs cosine of layer 0, which the artifact lacks: calibrate"),
        (dict(name="xshare", votes={"budget": 65}), r"votes.budget must be at most the model's experts \(64\), got 65"),
    ],
)
def test_what_a_layer_refuses(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)


def test_names():
    assert set(NAMED) == set(get_args(PolicyName))
    assert not make("none").changes_routing and make("oea").changes_routing
    assert not make("oea", primary_top_k=8).changes_routing
