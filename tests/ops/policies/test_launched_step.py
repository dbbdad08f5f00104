"""Policies as a GPU runs them: one launch each, whose results are those of the torch operations; what is too large for it."""

from dataclasses import replace

import pytest
import torch

from sere.conf.errors import ConfigError
from sere.conf.schema import RerouteConfig
from sere.conf.schema.named import NAMED
from sere.ops.kernels.counting import COUNTERS
from sere.ops.kernels.cuda import launched_step
from sere.ops.policies.policy import LayerInfo, Policy
from sere.ops.policies.scoring import Scoring
from sere.ops.reference import DECODE
from tests.ops.kernels.shim import SANITIZERS, cuda_on_cpu, needs_compiler

CPU = torch.device("cpu")
NUM_ROWS, NUM_EXPERTS, TOP_K = 24, 40, 6


@pytest.fixture(scope="module")
def shims():
    with cuda_on_cpu(*SANITIZERS) as shims:
        yield shims


def layer(**changes) -> LayerInfo:
    info = LayerInfo(
        index=7,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        renormalize=True,
        device=CPU,
        scoring=Scoring(function="softmax"),
    )
    return replace(info, **changes)


def policy_of(name: str, info: LayerInfo, **settings) -> Policy:
    generator = torch.Generator().manual_seed(0)
    square = (info.num_experts, info.num_experts)
    names = ("cosine", "folds", "fold_losses")
    tables = {name: torch.rand(square, generator=generator) for name in names}
    tables |= {"norms": torch.rand(info.num_experts, generator=generator), "beta": torch.tensor([0.4])}
    tables["means"] = torch.rand(info.num_experts, 8, generator=generator)
    budget = {"votes": {"budget": 9}} if NAMED[name].votes["rule"] == "budget" else {}
    return Policy(RerouteConfig(policy=name, similarity="x", **{**budget, **settings}), info, tables)


def run(step, generator, *, dtype=torch.float32, ids_dtype=torch.int32):
    logits = torch.randn(NUM_ROWS, NUM_EXPERTS, generator=generator)
    weights, ids = logits.softmax(-1).topk(TOP_K)
    weights = (weights / weights.sum(1, keepdim=True)).to(dtype)
    roles = torch.full((NUM_ROWS,), DECODE, dtype=torch.int8)
    counters, difference = torch.zeros(len(COUNTERS), dtype=torch.int64), torch.full((NUM_ROWS, NUM_EXPERTS), 9.0)
    info = torch.tensor([NUM_ROWS, NUM_ROWS, 1])
    results = step(weights, ids.to(ids_dtype), logits, roles, step=info, counters=counters, difference=difference)
    return *results, counters, difference


@needs_compiler
@pytest.mark.parametrize("name", NAMED)
def test_every_named_policy_is_one_launch(shims, name):
    policy = policy_of(name, layer())
    launched = launched_step(policy.rules, policy.layer, policy.similarity, policy._tables)
    policy.fast = None
    expected = run(policy.route_and_count, torch.Generator().manual_seed(1))
    before = shims.num_launches
    weights, ids, counters, difference = run(launched, torch.Generator().manual_seed(1))
    assert shims.num_launches == before + 1
    assert torch.equal(ids, expected[1].int()) and torch.equal(counters, expected[2])
    torch.testing.assert_close(weights, expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(difference, expected[3], rtol=0, atol=1e-6)
    changes = name != "none"
    assert bool(difference.any()) == changes and bool(counters[COUNTERS.index("rerouted_slots")] > 0) == changes


@needs_compiler
@pytest.mark.parametrize("name", ["sere", "oea"])
def test_ids_and_weights_are_changed_where_they_are(shims, name):
    """Routers return new tensors, and a copy would be another launch."""
    policy = policy_of(name, layer())
    launched = launched_step(policy.rules, policy.layer, policy.similarity, policy._tables)
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(NUM_ROWS, NUM_EXPERTS, generator=generator)
    weights, ids = logits.softmax(-1).topk(TOP_K)
    ids = ids.int()
    roles = torch.full((NUM_ROWS,), DECODE, dtype=torch.int8)
    before = ids.clone()
    nothing = dict(step=None, counters=None, difference=None)
    new_weights, new_ids = launched(weights, ids.view(torch.uint32), logits, roles, **nothing)
    assert new_ids.dtype == torch.int32 and new_ids.data_ptr() == ids.data_ptr()
    assert new_weights.data_ptr() == weights.data_ptr() and not torch.equal(ids, before)


@needs_compiler
def test_weights_of_another_type_and_logits_that_are_not_contiguous(shims):
    policy = policy_of("oea", layer())
    launched = launched_step(policy.rules, policy.layer, policy.similarity, policy._tables)
    logits = torch.randn(NUM_EXPERTS, NUM_ROWS, generator=torch.Generator().manual_seed(3), dtype=torch.float64).T
    weights, ids = logits.softmax(-1).topk(TOP_K)
    roles = torch.full((NUM_ROWS,), DECODE, dtype=torch.int8)
    nothing = dict(step=None, counters=None, difference=None)
    expected = policy.route(weights.bfloat16(), ids, logits, roles)
    actual = launched(weights.bfloat16(), ids.clone(), logits, roles, **nothing)
    assert actual[0].dtype == torch.bfloat16
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("name", ["none", "sere", "oea"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1025, 8), (64, 33)])
def test_what_is_too_large_is_refused(name, num_experts, top_k):
    info = layer(num_experts=num_experts, top_k=top_k)
    policy = policy_of(name, info)
    with pytest.raises(ConfigError, match=rf"layer 7 has {num_experts} experts .*at most 1024 and 32: remove `sere`"):
        launched_step(policy.rules, info, policy.similarity, policy._tables)


def test_more_groups_than_the_kernel_holds_are_left_to_torch():
    info = layer(num_experts=80, scoring=Scoring(function="sigmoid", num_groups=40, groups_kept=20))
    policy = policy_of("oea", info)
    assert launched_step(policy.rules, info, policy.similarity, policy._tables) is None
