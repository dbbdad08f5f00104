"""The compiled CPU path: every policy against the reference, its counters against torch's."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from sere.conf.schema import RerouteConfig
from sere.ops.kernels.counting import COUNTERS
from sere.ops.kernels.cpu import CompiledStep
from sere.ops.policies.policy import LayerInfo, Policy
from sere.ops.policies.scoring import Scoring
from sere.ops.reference import DECODE, PADDING, PREFILL
from tests.examples import examples
from tests.ops.strategies import PolicyStep, policy_steps

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
SENTINEL = 7.0


def make(name: str, *, num_experts: int = 16, top_k: int = 4, **settings: object) -> Policy:
    layer = LayerInfo(
        index=0,
        num_experts=num_experts,
        top_k=top_k,
        renormalize=True,
        device=torch.device("cpu"),
        scoring=Scoring(function="softmax"),
    )
    policy = Policy(RerouteConfig(policy=name, similarity="x", **settings), layer, {"cosine": torch.ones(16, 16)})
    assert isinstance(policy.fast, CompiledStep)
    return policy


def a_step(num_tokens: int = 8, num_experts: int = 16, top_k: int = 4) -> tuple[torch.Tensor, ...]:
    """Weights, ids, logits and roles of a decode step."""
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(0))
    weights, ids = logits.softmax(-1).topk(top_k)
    return weights, ids, logits, torch.full((num_tokens,), DECODE, dtype=torch.int8)


def info_of(roles: torch.Tensor) -> torch.Tensor:
    """`TokenRoles.step` of a step that is not left alone."""
    num_decode = int((roles == DECODE).sum())
    return torch.tensor([num_decode, int((roles != PADDING).sum()), int(num_decode > 0)])


def spread_out(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, not next to each other."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def same_but_for_near_ties(step: PolicyStep, ids: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether ids are the reference's. Where an expert was taken for another whose selection score lies within 4 ulp of its
    own, either is right; such cases are counted as an event."""
    if torch.equal(ids, expected):
        return True
    selection = step.scoring.scores(step.logits)[1]
    rows = (ids != expected).any(1).nonzero().flatten().tolist()
    for row in rows:
        ours, theirs = (selection[row, each[row].long().clamp(min=0)].sort().values for each in (ids, expected))
        if not torch.allclose(ours, theirs, rtol=4 * torch.finfo(torch.float32).eps, atol=0):
            return False
    event("near ties", payload=len(rows))
    return True


def check(step: PolicyStep, policy: Policy, *, uint32: bool = False, half: bool = False, apart: bool = False) -> None:
    """One call gives the reference's result, and torch's counters and difference, and changes nothing else."""
    fast, policy.fast = policy.fast, None
    assert isinstance(fast, CompiledStep)
    given = [step.topk_weights, step.topk_ids, step.logits, step.roles]
    if uint32 and given[1].dtype == torch.int32:
        given[1] = given[1].view(torch.uint32)
    if half:
        # The reference sees the same rounded logits.
        given[2] = given[2].bfloat16()
        step = PolicyStep(
            **{**{name: getattr(step, name) for name in PolicyStep.__dataclass_fields__}, "logits": given[2].float()}
        )
    if apart:
        given[:3] = map(spread_out, given[:3])
    before = [tensor.clone() for tensor in given]
    info, results = info_of(step.roles), []
    for run in (fast, policy.route_and_count):
        counters = torch.arange(len(COUNTERS)) * 1000
        difference = torch.full((len(step.topk_ids) + 2, step.num_experts), SENTINEL)
        with torch.inference_mode():
            weights, ids = run(*given, step=info, counters=counters, difference=difference)
        results.append((weights, ids, counters, difference))
    (weights, ids, counters, difference), (_, _, torch_counters, torch_difference) = results
    assert ids.dtype == given[1].dtype and weights.dtype == torch.float32
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True)), "the arguments must not change"
    expected_weights, expected_ids = step.expected()
    ids = ids.view(torch.int32) if uint32 and ids.dtype == torch.uint32 else ids
    assert same_but_for_near_ties(step, ids, expected_ids)
    if torch.equal(ids, expected_ids):
        torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=0)
        torch.testing.assert_close(difference, torch_difference, rtol=1e-5, atol=1e-6)
        assert dict(zip(COUNTERS, counters.tolist(), strict=True)) == dict(zip(COUNTERS, torch_counters.tolist(), strict=True))
    assert (difference[len(ids) :] == SENTINEL).all()


@settings(max_examples=examples(400), deadline=None)
@given(step=policy_steps(max_experts=512), uint32=st.booleans(), apart=st.booleans())
def test_equals_the_reference(step: PolicyStep, uint32: bool, apart: bool):
    check(step, step.policy(), uint32=uint32, apart=apart)


@settings(max_examples=examples(100), deadline=None)
@given(step=policy_steps())
def test_reads_bfloat16_logits(step: PolicyStep):
    check(step, step.policy(), half=True)


@settings(max_examples=examples(60), deadline=None)
@given(step=policy_steps(), excluded=st.integers(1, 4))
def test_experts_that_a_router_excludes(step: PolicyStep, excluded: int):
    """A logit of minus infinity: a score of 0, the last to be chosen."""
    logits = step.logits.clone()
    logits[:, :excluded] = -torch.inf
    if excluded >= step.num_experts - step.topk_ids.shape[1] or step.scoring.groups_kept < step.scoring.num_groups:
        return
    scores, selection = step.scoring.scores(logits)
    ids = selection.topk(step.topk_ids.shape[1], dim=1).indices
    changed = {"logits": logits, "topk_ids": ids, "topk_weights": scores.gather(1, ids)}
    fields = {name: getattr(step, name) for name in PolicyStep.__dataclass_fields__} | changed
    check(PolicyStep(**fields), step.policy())


@settings(max_examples=examples(60), deadline=None)
@given(step=policy_steps())
def test_a_step_that_is_left_alone_is_counted_and_returned(step: PolicyStep):
    """Its decode rows come as prefill rows, and as decode rows in `step`."""
    policy = step.policy()
    roles = step.roles.masked_fill(step.roles == DECODE, PREFILL)
    info = info_of(step.roles) * torch.tensor([1, 1, 0])
    counters = [torch.zeros(len(COUNTERS), dtype=torch.int64) for _ in range(2)]
    arguments = (step.topk_weights, step.topk_ids, step.logits, roles)
    weights, ids = policy.route_and_count(*arguments, step=info, counters=counters[0])
    assert weights is step.topk_weights and ids is step.topk_ids
    policy.fast = None
    policy.route_and_count(*arguments, step=info, counters=counters[1])
    assert torch.equal(*counters)


def test_nothing_to_do_returns_the_arguments():
    weights, ids, logits, roles = a_step()
    counters = torch.zeros(len(COUNTERS), dtype=torch.int64)
    # Profiling: no row is known.
    for name in ("none", "oea"):
        result = make(name).route_and_count(
            weights, ids, logits, torch.zeros_like(roles), step=torch.zeros(3, dtype=torch.int64), counters=counters
        )
        assert result[0] is weights and result[1] is ids and not counters.any()
    result = make("none").route_and_count(weights, ids, logits, roles)
    assert result[0] is weights and result[1] is ids


def test_weights_stay_where_only_ids_change():
    weights, ids, logits, roles = a_step()
    result = make("sere", primary_top_k=1).route_and_count(weights, ids, logits, roles)
    assert result[0] is weights and not torch.equal(result[1], ids)


def test_weights_of_16_bits_come_back_as_such():
    weights, ids, logits, roles = a_step()
    policy = make("oea", primary_top_k=1)
    new, new_ids = policy.route_and_count(weights.bfloat16(), ids, logits, roles)
    expected, expected_ids = policy.route_and_count(weights.bfloat16().float(), ids, logits, roles)
    assert new.dtype == torch.bfloat16 and torch.equal(new, expected.bfloat16()) and torch.equal(new_ids, expected_ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(topk_ids=torch.full((8, 4), 16)), "below num_experts, 16, got 16"),
        (dict(topk_ids=torch.zeros(8, 4, dtype=torch.int16)), "int32, int64 or uint32"),
        (dict(roles=torch.full((7,), DECODE, dtype=torch.int8)), r"roles must be int8 \[8\]"),
        (dict(router_logits=torch.zeros(8, 15)), r"router_logits must be \[8, 16\]"),
        (dict(counters=torch.zeros(11, dtype=torch.int64)), r"counters must be contiguous int64 \[14\]"),
        (dict(difference=torch.zeros(7, 16)), r"difference must be float32 \[at least 8, 16\]"),
    ],
)
def test_refuses_what_it_would_misread(change, message):
    arguments = dict(zip(("topk_weights", "topk_ids", "router_logits", "roles"), a_step(), strict=True))
    arguments |= dict(step=torch.tensor([8, 8, 1]), counters=torch.zeros(len(COUNTERS), dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        make("oea", primary_top_k=1).route_and_count(**{**arguments, **change})


def test_padding_rows_may_hold_anything():
    weights, ids, logits, roles = a_step()
    ids[3:], roles[3:] = 2**40, PADDING
    _, new_ids = make("oea", primary_top_k=1).route_and_count(weights, ids, logits, roles)
    assert torch.equal(new_ids[3:], ids[3:]) and not torch.equal(new_ids[:3], ids[:3])


def test_threads_may_share_a_layer():
    policy = make("oea", primary_top_k=1)
    steps = [a_step(num_tokens) for num_tokens in (3, 70, 8, 33) * 50]
    expected = [policy.route_and_count(*step) for step in steps]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda step: policy.route_and_count(*step), steps))
    assert all(torch.equal(*pair) for got, want in zip(results, expected, strict=True) for pair in zip(got, want, strict=True))
