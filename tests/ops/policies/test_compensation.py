"""Compensation: the fast form against the reference, and what makes it exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.conf.errors import ConfigError
from sere.conf.schema import RerouteConfig
from sere.conf.schema.rules import Compensation
from sere.ops.policies.compensation import Compensator
from sere.ops.policies.policy import Policy
from sere.ops.reference import compensate_reference
from tests.examples import examples
from tests.ops.strategies import PolicyStep, policy_steps

HIDDEN, STORED = 12, 3


def tables_of(num_experts: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "means": torch.randn(num_experts, HIDDEN, generator=generator),
        "surrogate_in": torch.randn(num_experts * STORED, HIDDEN, generator=generator),
        "surrogate_out": torch.randn(num_experts * STORED, HIDDEN, generator=generator),
        "surrogate_means": torch.randn(STORED, num_experts, HIDDEN, generator=generator),
    }


@settings(max_examples=examples(60), deadline=None)
@given(step=policy_steps(max_tokens=12, max_experts=33), rank=st.integers(0, STORED), seed=st.integers(0, 1000))
def test_equals_the_reference(step: PolicyStep, rank, seed):
    tables = {**step.tables, **tables_of(step.num_experts, seed)}
    before = step.reroute
    compensation = {"rule": "surrogate", "rank": rank}
    config = RerouteConfig(
        policy="oea",
        similarity="x",
        votes=before.votes,
        targets=before.targets,
        weights=before.weights,
        compensation=compensation,
    )
    policy = Policy(config, step.info(), tables)
    difference = torch.zeros(len(step.topk_ids), step.num_experts)
    routed = policy.route_and_count(step.topk_weights, step.topk_ids, step.logits, step.roles, difference=difference)
    states = torch.randn(len(step.topk_ids), HIDDEN, generator=torch.Generator().manual_seed(seed))
    compensator = Compensator(policy.rules.compensation, tables, device=states.device, dtype=torch.float32)
    added = compensator.add(torch.zeros_like(states), states, difference)
    expected = compensate_reference(
        config, states, (step.topk_weights, step.topk_ids), routed, tables, roles=step.roles, layer=step.layer
    )
    torch.testing.assert_close(added.double(), expected, rtol=1e-4, atol=1e-4)
    half = compensator.add(states, states, difference, share=0.5)
    torch.testing.assert_close(half, states + added / 2, rtol=1e-4, atol=1e-4)


def test_surrogates_of_experts_that_are_what_they_estimate_give_the_unmodified_output():
    """Rank-3 linear experts, dropped to one each: with their surrogates nothing is lost."""
    tables, num_experts = tables_of(5), 5
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(7, HIDDEN, generator=generator)
    v, u = (tables[name].view(num_experts, STORED, HIDDEN) for name in ("surrogate_in", "surrogate_out"))
    outputs = torch.einsum("th,erh,ero->teo", states, v, u) + tables["surrogate_means"][-1]
    weights, ids = torch.rand(7, 5, generator=generator).topk(2)

    def layer(weights, ids):
        return (outputs.gather(1, ids.unsqueeze(2).expand(-1, -1, HIDDEN)) * weights.unsqueeze(2)).sum(1)

    kept = weights.masked_fill(torch.tensor([False, True]), 0)
    config = RerouteConfig(policy="sere_t", similarity="x", compensation={"rank": STORED})
    added = compensate_reference(config, states, (weights, ids), (kept, ids), tables)
    torch.testing.assert_close((layer(kept, ids) + added).float(), layer(weights, ids), rtol=1e-4, atol=1e-4)


def test_a_rank_above_the_stored_one_is_refused():
    with pytest.raises(ConfigError, match=r"compensation\.rank must be at most 3, the artifact's surrogate_rank, got 4"):
        Compensator(Compensation(rule="surrogate", rank=4), tables_of(5), device=torch.device("cpu"), dtype=torch.float32)
