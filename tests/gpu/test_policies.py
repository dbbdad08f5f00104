"""Every policy's kernel and compensation on a GPU: the reference's results, also under graph replay."""

import pytest
import torch
from hypothesis import given, settings

from sere.conf.schema import RerouteConfig
from sere.ops.kernels.compensating import compensate
from sere.ops.kernels.counting import COUNTERS
from sere.ops.policies.policy import LayerInfo, Policy
from sere.ops.policies.scoring import Scoring
from sere.ops.reference import DECODE, PADDING
from tests.examples import examples
from tests.ops.kernels.kernel_checks import check_compensation, check_policy_step, compensations, routing_modes
from tests.ops.strategies import policy_steps

on_gpu = settings(deadline=None, database=None)


@settings(on_gpu, max_examples=examples(1000))
@given(step=policy_steps(), mode=routing_modes())
def test_every_policy_equals_reference(device, step, mode):
    check_policy_step(step, mode, device)


@settings(on_gpu, max_examples=examples(150))
@given(step=policy_steps(max_tokens=150, max_experts=512, max_top_k=20), mode=routing_modes())
def test_every_policy_equals_reference_at_more_sizes(device, step, mode):
    check_policy_step(step, mode, device)


@settings(on_gpu, max_examples=examples(200))
@given(case=compensations())
def test_compensation(device, case):
    check_compensation(case, device)


@pytest.mark.parametrize("logits_type", [torch.float32, torch.bfloat16])
def test_own_targets_and_compensation_under_replay(device, logits_type):
    """A graph of one policy's step and what it adds, replayed with other inputs and roles."""
    num_rows, num_experts, top_k, hidden_size = 40, 128, 8, 512
    generator = torch.Generator().manual_seed(5)
    scoring = Scoring(function="sigmoid", bias=torch.rand(num_experts, generator=generator), num_groups=8, groups_kept=4)
    config = RerouteConfig(policy="sere_t", similarity="x")
    info = dict(index=0, num_experts=num_experts, top_k=top_k, renormalize=True, scoring=scoring)
    tables = {"means": torch.randn(num_experts, hidden_size, generator=generator)}
    policy = Policy(config, LayerInfo(device=device, **info), tables)
    on_cpu = Policy(config, LayerInfo(device=torch.device("cpu"), **info), tables)
    logits = torch.zeros(num_rows, num_experts, dtype=logits_type, device=device)
    weights, ids = torch.zeros(num_rows, top_k, device=device), torch.zeros(num_rows, top_k, dtype=torch.int32, device=device)
    roles, step = torch.zeros(num_rows, dtype=torch.int8, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)
    difference = torch.zeros(num_rows, num_experts, device=device)
    output = torch.randn(num_rows, hidden_size, generator=generator).to(device)
    means = tables["means"].to(device)

    def launch():
        routed = policy.route_and_count(weights, ids, logits, roles, step=step, counters=counters, difference=difference)
        return routed, compensate(output, output, difference, means, None, None, share=1.0)

    launch()
    counters.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (new_weights, new_ids), compensated = launch()
    for num_decoding in (40, 25, 4, 0):
        drawn = torch.randn(num_rows, num_experts, generator=generator).to(logits_type)
        scores, selection = scoring.scores(drawn)
        old_ids = selection.topk(top_k).indices.int()
        old_weights = scores.gather(1, old_ids.long())
        new_roles = torch.where(torch.arange(num_rows) < num_decoding, DECODE, PADDING).to(torch.int8)
        for buffer, value in ((logits, drawn), (weights, old_weights), (ids, old_ids), (roles, new_roles)):
            buffer.copy_(value)
        step.copy_(torch.tensor([num_decoding, num_decoding, int(num_decoding > 0)]))
        graph.replay()
        expected_difference = torch.zeros(num_rows, num_experts)
        expected = on_cpu.route_and_count(old_weights, old_ids, drawn, new_roles, difference=expected_difference)
        assert torch.equal(new_ids.cpu(), expected[1])
        torch.testing.assert_close(new_weights.cpu(), expected[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(difference.cpu(), expected_difference, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            compensated.cpu(), output.cpu() + expected_difference @ tables["means"], rtol=1e-4, atol=1e-4
        )
    assert counters[COUNTERS.index("steps")] == 3 and counters[COUNTERS.index("rerouted_slots")] > 0
