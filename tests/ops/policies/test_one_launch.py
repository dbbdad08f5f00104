"""Policies that a GPU runs in one launch: what the launch gives is what the torch operations give, counters included."""

import pytest
import torch
from hypothesis import given, settings

from sere.conf.errors import ConfigError
from sere.conf.schema import RerouteConfig
from sere.ops.kernels.counting import COUNTERS
from sere.ops.kernels.neighbours import neighbours_of
from sere.ops.policies import POLICIES
from sere.ops.policies.base import LayerInfo
from sere.ops.policies.one_launch import OneLaunchPolicy
from tests.examples import examples
from tests.ops.kernels.kernel_checks import step_of
from tests.ops.kernels.shim import SANITIZERS, cuda_on_cpu, needs_compiler
from tests.ops.policies.test_policies import all_roles, make
from tests.ops.strategies import Step, steps

ONE_LAUNCH = ["none", "sere", "random"]


@pytest.fixture(scope="module")
def shims():
    with cuda_on_cpu(*SANITIZERS) as shims:
        yield shims


def as_on_a_gpu(policy):
    """The policy as it is made for a GPU, with tensors of the CPU."""
    policy.uses_kernel = True
    if policy.changes_routing:
        policy.neighbours = neighbours_of(policy.similarity, policy.threshold)
    return policy


def run(policy, step: Step, ids, *, counted: bool):
    roles, step_info = step_of(all_roles(step), left_alone=False)
    counters = torch.zeros(len(COUNTERS), dtype=torch.int64) if counted else None
    logits = torch.zeros(len(ids), step.similarity.shape[0])
    return *policy.route_and_count(step.topk_weights, ids, logits, roles, step=step_info, counters=counters), counters


@needs_compiler
@pytest.mark.parametrize("name", ONE_LAUNCH)
@settings(max_examples=examples(40), deadline=None)
@given(step=steps(max_tokens=40, max_experts=64))
def test_equals_torch_operations(shims, name, step):
    arguments = dict(primary_top_k=step.primary_top_k, threshold=step.threshold)
    expected = run(make(name, step, **arguments), step, step.topk_ids.clone(), counted=True)
    ids = step.topk_ids.clone()
    weights, new_ids, counters = run(as_on_a_gpu(make(name, step, **arguments)), step, ids, counted=True)
    assert new_ids is ids and weights is step.topk_weights
    assert torch.equal(new_ids, expected[1]) and torch.equal(counters, expected[2])


@needs_compiler
def test_unsigned_ids_are_changed_where_they_are(shims):
    weights, ids = torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([[0, 2], [1, 2]], dtype=torch.int32)
    step = Step(weights, ids, torch.ones(3, 3), None, primary_top_k=1, threshold=0.0)
    _, new_ids, _ = run(as_on_a_gpu(make("sere", step)), step, ids.view(torch.uint32), counted=False)
    assert new_ids.dtype == torch.int32 and new_ids.data_ptr() == ids.data_ptr()
    assert ids.tolist() == [[0, 0], [1, 0]]


def test_who_launches_and_what_is_too_large(monkeypatch):
    monkeypatch.setattr("sere.ops.policies.sere.neighbours_of", lambda similarity, threshold: None)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: self)
    sizes = dict(index=7, renormalize=True, device=torch.device("cuda"))
    for name in POLICIES:
        config = RerouteConfig(policy=name, similarity="x", primary_top_k=1)
        for num_experts, top_k in ((1024, 32), (1025, 8), (64, 33)):
            info = LayerInfo(num_experts=num_experts, top_k=top_k, **sizes)
            if not issubclass(POLICIES[name], OneLaunchPolicy):
                assert name not in ONE_LAUNCH
                POLICIES[name](config, info)
            elif (num_experts, top_k) == (1024, 32):
                assert name in ONE_LAUNCH and POLICIES[name](config, info, torch.ones(1, 1)).uses_kernel
            else:
                with pytest.raises(ConfigError, match=rf"layer 7 has {num_experts} experts .*at most 1024 and 32"):
                    POLICIES[name](config, info, torch.ones(1, 1))
