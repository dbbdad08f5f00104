"""The kernels of policies and of compensation on the CPU, under sanitizers (see cuda_on_cpu/cuda.h)."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.conf.schema import RerouteConfig
from sere.ops.kernels.compensating import compensate
from sere.ops.policies.scoring import Scoring
from sere.ops.reference import DECODE
from tests.examples import examples
from tests.ops.kernels.kernel_checks import check_compensation, check_policy_step, compensations, routing_modes
from tests.ops.kernels.shim import SANITIZERS, cuda_on_cpu, needs_compiler
from tests.ops.strategies import PolicyStep, policy_steps

CPU = torch.device("cpu")
pytestmark = [needs_compiler, pytest.mark.slow]
in_bounds = settings(deadline=None, database=None)


@pytest.fixture(scope="module")
def shims():
    with cuda_on_cpu(*SANITIZERS) as shims:
        yield shims


COUNTED_TOGETHER = [
    {"rule": "top", "primary_top_k": 1.5},
    {"rule": "mass", "mass": 0.5},
    {"rule": "benefit", "benefit": 0.4},
    *({"rule": "budget", "budget": 4, "score": score, "winner": 0.5} for score in ("probability", "weight", "norm", "lynx")),
]


@pytest.mark.parametrize("votes", COUNTED_TOGETHER, ids=str)
@settings(in_bounds, max_examples=examples(60))
@given(data=st.data(), mode=routing_modes())
def test_votes_that_depend_on_other_rows_or_slots(shims, votes, data, mode):
    """More cases of each than drawing all rules gives."""
    enough = policy_steps(max_experts=33, max_top_k=6, votes=votes).filter(
        lambda step: len(step.topk_ids) > 4 and step.topk_ids.shape[1] > 1 and step.num_experts > 4
    )
    check_policy_step(data.draw(enough), mode, CPU)


@settings(in_bounds, max_examples=examples(30))
@given(seed=st.integers(0, 2**32 - 1), function=st.sampled_from(["softmax", "sigmoid"]))
def test_of_equal_experts_the_lowest_is_taken(shims, seed, function):
    """Of several in one lane, too: few distinct logits and more experts than lanes."""
    logits = (torch.randn(16, 128, generator=torch.Generator().manual_seed(seed)) * 2).round() / 2
    scoring = Scoring(function=function)
    scores, selection = scoring.scores(logits)
    ids = selection.topk(6).indices
    step = PolicyStep(
        reroute=RerouteConfig(policy="oea", primary_top_k=2),
        topk_weights=scores.gather(1, ids),
        topk_ids=ids,
        logits=logits,
        scoring=scoring,
        tables={},
        roles=torch.full((16,), DECODE, dtype=torch.int8),
        renormalize=True,
    )
    mode = dict(counted=True, left_alone=False, differences=True, ties=False, dtype=torch.bfloat16)
    check_policy_step(step, mode, CPU)


@settings(in_bounds, max_examples=examples(800))
@given(step=policy_steps(), mode=routing_modes())
def test_every_policy_equals_reference(shims, step, mode):
    check_policy_step(step, mode, CPU)


@settings(in_bounds, max_examples=examples(150))
@given(step=policy_steps(max_tokens=150, max_experts=512, max_top_k=20), mode=routing_modes())
def test_every_policy_equals_reference_at_more_sizes(shims, step, mode):
    check_policy_step(step, mode, CPU)


FRACTION = policy_steps(votes={"rule": "top", "primary_top_k": 1.4}, max_top_k=4).filter(
    lambda step: step.topk_ids.shape[1] > 1
)


@settings(in_bounds, max_examples=examples(40))
@given(step=FRACTION, mode=routing_modes(), copies=st.integers(10, 60))
def test_a_fraction_of_more_rows_than_threads(shims, step, mode, copies):
    """Shares are then compared a block's worth of rows at a time; the copies' are equal."""
    repeated = ("topk_weights", "topk_ids", "logits", "roles")
    step = replace(step, **{name: torch.cat([getattr(step, name)] * copies) for name in repeated})
    check_policy_step(step, mode, CPU)


@settings(in_bounds, max_examples=examples(150))
@given(case=compensations())
def test_compensation(shims, case):
    check_compensation(case, CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_16_bits_are_rounded_as_torch_rounds_them(shims, dtype):
    """All of them, and what lies between two: through a layer of one expert, which adds 0 or half a step."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()].view(-1, 8)
    means = torch.full((1, 8), 1.0, dtype=dtype)
    for lost in (0.0, 2.0**-26, 2.0**-25, 1.0, 3.0, 1000.7):
        difference = torch.full((len(every), 1), lost)
        actual = compensate(every, every, difference, means, None, None, share=1.0)
        assert torch.equal(actual, (every.float() + lost).to(dtype))


def test_a_thousand_cases_ran(shims):
    """That the tests above did run the kernels, and how often."""
    print(f"{shims.num_launches} launches")
    assert shims.num_launches > 1000
