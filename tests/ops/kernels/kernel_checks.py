"""What holds for the CUDA kernels wherever they run: on a GPU (tests/gpu), or compiled for the CPU (test_cuda.py)."""

from dataclasses import replace

import torch
from hypothesis import event
from hypothesis import strategies as st

from sere.conf.schema.rules import Compensation, Votes
from sere.ops.engine.roles import TokenRoles
from sere.ops.kernels import cuda
from sere.ops.kernels.counting import COUNTERS, count_step
from sere.ops.kernels.neighbours import sorted_neighbours
from sere.ops.policies.compensation import Compensator
from sere.ops.policies.votes import RoutedStep, cast_votes
from sere.ops.reference import DECODE, PADDING, PREFILL, reroute_reference
from sere.ops.reference_step import UNITS
from tests.ops.strategies import PolicyStep, Step

SENTINEL = -77
_TIE_ULP = 4


@st.composite
def modes(draw: st.DrawFn) -> dict[str, bool]:
    """Ways to launch the kernel."""
    return {name: draw(st.booleans()) for name in ("in_place", "counted", "left_alone", "neutral")}


def step_of(roles: torch.Tensor, *, left_alone: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Roles and `TokenRoles.step` of a step; left alone, decode rows are marked as prefill rows."""
    decode = int((roles == DECODE).sum())
    step = torch.tensor([decode, int((roles != PADDING).sum()), int(decode > 0 and not left_alone)])
    return roles.masked_fill(roles == DECODE, PREFILL) if left_alone else roles, step


def count_reroute(counters, weights, ids_before, ids_after, *, roles, step, num_experts, primary_top_k) -> None:
    """`count_step` of a step that SERE re-routed."""
    routed = RoutedStep(
        weights=weights, ids=ids_before.long(), roles=roles, scores=None, selection=None, num_experts=num_experts
    )
    active = cast_votes(Votes(rule="top", primary_top_k=primary_top_k), routed, {}).active
    count_step(counters, ids_before=routed.ids, ids_after=ids_after.long(), roles=roles, step=step, active=active)


def check_reroute(step: Step, mode: dict[str, bool], device: torch.device) -> None:
    """One launch gives the reference's ids and `count_step`'s counters, and changes nothing else."""
    num_tokens, top_k = step.topk_ids.shape
    num_experts = step.similarity.shape[0]
    primary_top_k = top_k if mode["neutral"] else step.primary_top_k
    roles, step_info = step.roles, None
    if mode["counted"] or mode["left_alone"]:
        roles = torch.full((num_tokens,), DECODE, dtype=torch.int8) if roles is None else roles
        roles, step_info = step_of(roles, left_alone=mode["left_alone"])
    expected = reroute_reference(
        step.topk_weights,
        step.topk_ids,
        step.similarity,
        primary_top_k=primary_top_k,
        threshold=step.threshold,
        roles=roles,
    )
    expected_counters = torch.arange(len(COUNTERS)) * 1000
    if mode["counted"]:
        sizes = dict(num_experts=num_experts, primary_top_k=primary_top_k)
        count_reroute(expected_counters, step.topk_weights, step.topk_ids, expected, roles=roles, step=step_info, **sizes)

    weights, ids = step.topk_weights.to(device, copy=True), step.topk_ids.to(device, copy=True)
    new_ids = ids if mode["in_place"] else torch.full_like(ids, SENTINEL)
    neighbours = sorted_neighbours(step.similarity, step.threshold).to(device)
    counters = (torch.arange(len(COUNTERS)) * 1000).to(device)
    cuda.reroute(
        weights,
        ids,
        None if mode["neutral"] else neighbours,
        num_experts=num_experts,
        primary_top_k=primary_top_k,
        new_ids=new_ids,
        roles=None if roles is None else roles.to(device),
        step=None if step_info is None else step_info.to(device),
        counters=counters if mode["counted"] else None,
    )
    assert torch.equal(new_ids.cpu(), expected)
    assert dict(zip(COUNTERS, counters.tolist(), strict=True)) == dict(zip(COUNTERS, expected_counters.tolist(), strict=True))
    assert torch.equal(weights.cpu(), step.topk_weights)
    if not mode["in_place"]:
        assert torch.equal(ids.cpu(), step.topk_ids)


@st.composite
def routing_modes(draw: st.DrawFn) -> dict:
    """Ways to launch a policy's kernel."""
    modes = {name: draw(st.booleans()) for name in ("counted", "differences", "ties")}
    return modes | {
        "left_alone": draw(st.integers(0, 9)) == 9,
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    }


def has_near_ties(step: PolicyStep) -> bool:
    """Whether values that rank experts are so close that functions right to the last bits may rank them either way."""
    rows = step.roles == DECODE
    scores, selection = (values[rows] for values in step.scoring.scores(step.logits))
    ranked = selection.sort(dim=1).values
    gap, size = ranked.diff(dim=1), ranked[:, 1:].abs()
    # Equal logits have equal scores in every implementation.
    close = (gap > 0) & (gap <= _TIE_ULP * torch.finfo(torch.float32).eps * size)
    if step.reroute.rules(step.layer).votes.rule != "budget":
        return bool(close.any())
    points = (scores.double() * UNITS).sum(0).sort().values
    return bool(close.any()) or bool(((points.diff() > 0) & (points.diff() <= 1e-6 * points[1:])).any())


def check_policy_step(step: PolicyStep, mode: dict, device: torch.device) -> None:
    """One launch gives the reference's ids and weights, `count_step`'s counters and `difference_of`; else nothing changes."""
    roles, info = step_of(step.roles, left_alone=mode["left_alone"])
    step = replace(step, roles=roles, logits=step.logits.to(mode["dtype"]))
    if mode["ties"]:
        # Few distinct weights, zeros among them, and logits; but which of equal groups is chosen torch leaves open.
        logits = step.logits if step.scoring.num_groups > 1 else (step.logits * 2).round() / 2
        step = replace(step, topk_weights=(step.topk_weights * 8).round() / 8, logits=logits)
    if step.reroute.rules(step.layer).votes.order == "selection" and step.scoring.bias is None:
        # Such a router's weights rank as what it ranks by, also where logits were rounded.
        scores, _ = step.scoring.scores(step.logits)
        step = replace(step, topk_weights=scores.gather(1, step.topk_ids.clamp(min=0).long()))
    num_tokens = len(step.topk_ids)
    expected_weights, expected_ids = step.expected()
    policy = step.policy()
    # The same in torch operations, which count.
    policy.fast = None
    expected_counters, counters = (torch.arange(len(COUNTERS)) * 1000 for _ in range(2))
    expected_difference = torch.zeros(num_tokens, step.num_experts)
    policy.route_and_count(
        *(step.topk_weights, step.topk_ids, step.logits, roles),
        step=info if mode["counted"] else None,
        counters=expected_counters if mode["counted"] else None,
        difference=expected_difference,
    )

    similarity = None if policy.similarity is None else policy.similarity.to(device)
    tables = {name: table.to(device) for name, table in step.tables.items()}
    launched = cuda.launched_step(policy.rules, step.info(str(device)), similarity, tables)
    assert launched is not None
    difference = torch.full((num_tokens + 3, step.num_experts), float(SENTINEL), device=device)
    counters = counters.to(device)
    weights, ids = launched(
        step.topk_weights.to(device, copy=True),
        step.topk_ids.to(device, copy=True),
        step.logits.to(device),
        roles.to(device),
        step=info.to(device) if mode["counted"] or mode["left_alone"] else None,
        counters=counters if mode["counted"] else None,
        difference=difference if mode["differences"] else None,
    )
    weights, ids, difference = weights.cpu(), ids.cpu(), difference.cpu()
    assert weights.dtype == expected_weights.dtype and ids.dtype == expected_ids.dtype
    untouched = difference if not mode["differences"] else difference[num_tokens:]
    assert (untouched == SENTINEL).all()
    if not torch.equal(ids, expected_ids):
        # Either id is right; which one decides on all that follows.
        assert has_near_ties(step), (ids, expected_ids)
        event("scores within 4 ulp")
        return
    rest = roles != DECODE
    assert torch.equal(weights[rest], step.topk_weights[rest])
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=1e-9)
    assert dict(zip(COUNTERS, counters.tolist(), strict=True)) == dict(zip(COUNTERS, expected_counters.tolist(), strict=True))
    if mode["differences"]:
        assert not difference[:num_tokens][rest].any()
        torch.testing.assert_close(difference[:num_tokens], expected_difference, rtol=1e-6, atol=1e-6)


@st.composite
def compensations(draw: st.DrawFn) -> dict:
    """Layers whose experts are compensated, and what each of a step's rows has lost, most of it nothing."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    num_tokens, num_experts = draw(st.integers(0, 40)), draw(st.sampled_from([1, 5, 33, 128]))
    hidden_size, rank = 8 * draw(st.integers(1, 24)), draw(st.integers(0, 3))
    difference = torch.randn(num_tokens + draw(st.integers(0, 2)), num_experts, generator=generator)
    unchanged = torch.rand(difference.shape, generator=generator) > draw(st.sampled_from([0.0, 0.05, 0.3, 1.0]))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return dict(
        rank=rank,
        tables={
            "means": normal(num_experts, hidden_size),
            "surrogate_means": normal(3, num_experts, hidden_size),
            "surrogate_in": normal(num_experts * 3, hidden_size) / hidden_size**0.5,
            "surrogate_out": normal(num_experts * 3, hidden_size),
        },
        output=normal(num_tokens, hidden_size),
        hidden_states=normal(num_tokens, hidden_size),
        difference=difference.masked_fill(unchanged, 0),
        share=draw(st.sampled_from([1.0, 0.25])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    )


def check_compensation(case: dict, device: torch.device) -> None:
    """The launches give the sum of float64, rounded once, and read nothing of experts that lost nothing."""
    tables, dtype = case["tables"], case["dtype"]
    rule = Compensation(rule="surrogate" if case["rank"] else "mean", rank=case["rank"])
    used = case["difference"][: len(case["output"])].any(0)
    # What is not to be read would spoil the sum.
    poisoned = {name: table.clone() for name, table in tables.items()}
    for name, table in poisoned.items():
        experts = table.view(3, len(used), -1).transpose(0, 1) if name == "surrogate_means" else table.view(len(used), -1)
        experts[~used] = torch.nan
    output, states = (case[name].to(dtype) for name in ("output", "hidden_states"))
    exact_tables = {name: table.to(dtype).double() for name, table in tables.items()}
    exact = Compensator(rule, exact_tables, device=torch.device("cpu"), dtype=torch.float64)
    difference = case["difference"][: len(output)].double()
    expected = exact.add(output.double(), states.double(), difference, share=case["share"])

    compensator = Compensator(rule, poisoned, device=device, dtype=dtype)
    compensator.launches = True
    tensors = output.to(device, copy=True), states.to(device), case["difference"].to(device)
    actual = compensator.add(*tensors, share=case["share"])
    assert actual.dtype == dtype and torch.equal(tensors[0].cpu(), output)
    error = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=error * 1.01, atol=2e-4)
    assert torch.equal(compensator.add(*tensors, share=case["share"]), actual), "the same each time"


@st.composite
def batches(draw: st.DrawFn) -> dict:
    """Sequences of a step and the settings that decide on its roles."""
    lengths = draw(st.lists(st.integers(0, 3) | st.integers(0, 40), min_size=1, max_size=60))
    return dict(
        starts=torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32),
        capacity=sum(lengths) + draw(st.integers(0, 70)) or 1,
        decode_length=draw(st.integers(1, 4)),
        phase=draw(st.sampled_from(["decode", "all"])),
        min_tokens=draw(st.integers(1, 20)),
        max_tokens=draw(st.integers(1, 200) | st.just(2**40)),
    )


def check_token_roles(batch: dict, device: torch.device) -> None:
    """One launch gives the roles that the torch operations give."""
    settings = {name: value for name, value in batch.items() if name != "starts"}
    expected = TokenRoles(device=torch.device("cpu"), **settings)
    expected.fill(batch["starts"])
    roles = torch.full((batch["capacity"],), 77, dtype=torch.int8, device=device)
    step = torch.full((3,), SENTINEL, device=device)
    cuda.fill_roles(
        batch["starts"].to(device),
        roles,
        step,
        decode_length=batch["capacity"] if batch["phase"] == "all" else batch["decode_length"],
        min_tokens=batch["min_tokens"],
        max_tokens=batch["max_tokens"],
    )
    assert torch.equal(roles.cpu(), expected.roles)
    assert torch.equal(step.cpu(), expected.step)
