"""The kernels on a GPU: exactly the reference's results, also under graph replay and on several streams."""

import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings

from sere.ops import reroute_topk
from sere.ops.engine.roles import TokenRoles
from sere.ops.kernels import cuda
from sere.ops.kernels.counting import COUNTERS
from sere.ops.kernels.neighbours import sorted_neighbours
from sere.ops.reference import DECODE, PADDING, reroute_reference
from tests.examples import examples
from tests.ops.kernels.kernel_checks import (
    batches,
    check_reroute,
    check_token_roles,
    count_reroute,
    modes,
)
from tests.ops.strategies import Step, steps

on_gpu = settings(deadline=None, database=None)


@settings(on_gpu, max_examples=examples(1000))
@given(step=steps(max_tokens=256, max_experts=512), mode=modes())
def test_equals_reference(device, step: Step, mode):
    check_reroute(step, mode, device)


@settings(on_gpu, max_examples=examples(60))
@given(step=steps(max_tokens=1100, max_experts=1024, max_top_k=32), mode=modes())
def test_equals_reference_at_all_sizes(device, step: Step, mode):
    check_reroute(step, mode, device)


@settings(on_gpu, max_examples=examples(300))
@given(step=steps(max_tokens=128, max_experts=128))
def test_custom_op(device, step: Step):
    settings_ = dict(primary_top_k=step.primary_top_k, threshold=step.threshold)
    expected = reroute_reference(step.topk_weights, step.topk_ids, step.similarity, roles=step.roles, **settings_)
    tensors = [tensor.to(device) for tensor in (step.topk_weights, step.topk_ids, step.similarity)]
    roles = None if step.roles is None else step.roles.to(device)
    assert torch.equal(reroute_topk(*tensors, roles=roles, **settings_).cpu(), expected)


@settings(on_gpu, max_examples=examples(300))
@given(batch=batches())
def test_token_roles(device, batch):
    check_token_roles(batch, device)


def test_warm_up(device):
    cuda.warm_up(device)


def test_registered_as_torch_requires(device):
    tensors = torch.rand(5, 3), torch.randint(0, 8, (5, 3), dtype=torch.int32), torch.rand(8, 8)
    torch.library.opcheck(torch.ops.sere.reroute_topk.default, (*(t.to(device) for t in tensors), 1, 0.5, None))


class Captured:
    """A decode step of several layers in a CUDA graph, with buffers that stay where they are."""

    def __init__(self, device, *, num_rows, num_experts, top_k, dtype, num_layers=3, min_tokens=4, max_tokens=1024):
        generator = torch.Generator().manual_seed(num_rows)
        self.similarity = [torch.rand(num_experts, num_experts, generator=generator) for _ in range(num_layers)]
        self.neighbours = [sorted_neighbours(matrix, 0.5).to(device) for matrix in self.similarity]
        self.roles = TokenRoles(
            capacity=num_rows + 16, device=device, decode_length=1, phase="decode", min_tokens=min_tokens, max_tokens=max_tokens
        )
        self.expected_roles = TokenRoles(
            capacity=num_rows + 16,
            device=torch.device("cpu"),
            decode_length=1,
            phase="decode",
            min_tokens=min_tokens,
            max_tokens=max_tokens,
        )
        self.num_rows, self.num_experts, self.top_k = num_rows, num_experts, top_k
        self.weights = torch.zeros(num_layers, num_rows, top_k, device=device)
        self.ids = torch.zeros(num_layers, num_rows, top_k, dtype=dtype, device=device)
        self.counters = torch.zeros(num_layers, len(COUNTERS), dtype=torch.int64, device=device)
        self.expected_counters = self.counters.cpu()
        cuda.warm_up(device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.launch()

    def launch(self):
        for layer, neighbours in enumerate(self.neighbours):
            cuda.reroute(
                self.weights[layer],
                self.ids[layer],
                neighbours,
                num_experts=self.num_experts,
                primary_top_k=2,
                new_ids=self.ids[layer],
                roles=self.roles.roles[: self.num_rows],
                step=self.roles.step,
                counters=self.counters[layer],
            )

    def step(self, lengths, generator):
        """New inputs, new roles, one replay; checks the outcome."""
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        self.expected_roles.fill(starts)
        self.roles.fill(starts.to(self.roles.roles.device))
        scores = torch.rand(len(self.neighbours), self.num_rows, self.num_experts, generator=generator)
        weights, ids = scores.topk(self.top_k, sorted=False)
        ids = ids.to(self.ids.dtype)
        self.weights.copy_(weights)
        self.ids.copy_(ids)
        self.graph.replay()
        roles = self.expected_roles.roles[: self.num_rows]
        for layer, similarity in enumerate(self.similarity):
            expected = reroute_reference(weights[layer], ids[layer], similarity, primary_top_k=2, threshold=0.5, roles=roles)
            assert torch.equal(self.ids[layer].cpu(), expected)
            count_reroute(
                self.expected_counters[layer],
                weights[layer],
                ids[layer],
                expected,
                roles=roles,
                step=self.expected_roles.step,
                num_experts=self.num_experts,
                primary_top_k=2,
            )
        assert torch.equal(self.counters.cpu(), self.expected_counters)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("num_rows", "num_experts", "top_k"), [(8, 60, 4), (64, 128, 8), (200, 512, 10)])
def test_graph_replay_with_changed_inputs_roles_and_row_counts(device, dtype, num_rows, num_experts, top_k):
    captured = Captured(device, num_rows=num_rows, num_experts=num_experts, top_k=top_k, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for num_sequences in (num_rows, num_rows // 2, 5, 3, 1, num_rows):
        captured.step([1] * num_sequences, generator)
    captured.step([1] * 5 + [num_rows - 5], generator)
    captured.step([num_rows], generator)
    assert (captured.counters[:, COUNTERS.index("rerouted_slots")] > 0).all()


def test_max_tokens_holds_under_replay(device):
    captured = Captured(device, num_rows=64, num_experts=128, top_k=8, dtype=torch.int32, min_tokens=8, max_tokens=32)
    generator = torch.Generator().manual_seed(2)
    rerouted = []
    for num_sequences in (7, 8, 32, 33, 64, 20):
        before = captured.counters[0, COUNTERS.index("rerouted_slots")].item()
        captured.step([1] * num_sequences, generator)
        rerouted.append(captured.counters[0, COUNTERS.index("rerouted_slots")].item() > before)
    assert rerouted == [False, True, True, False, False, True]


def test_two_streams(device):
    """Each launch follows the stream that is torch's current one, and two streams do not disturb each other."""
    generator = torch.Generator().manual_seed(3)
    similarity = torch.rand(128, 128, generator=generator)
    neighbours = sorted_neighbours(similarity, 0.5).to(device)
    cuda.warm_up(device)
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    work = []
    for number in range(40):
        weights, ids = torch.rand(96, 128, generator=generator).topk(8)
        with torch.cuda.stream(streams[number % 2]):
            # The ids arrive late: a launch on another stream would read zeros.
            late = torch.zeros(96, 8, dtype=torch.int64, device=device)
            source, weights_there = ids.to(device), weights.to(device)
            torch.cuda._sleep(200_000)
            late.copy_(source)
            cuda.reroute(weights_there, late, neighbours, num_experts=128, primary_top_k=1, new_ids=late)
            work.append((weights, ids, late, weights_there))
    torch.cuda.synchronize()
    for weights, ids, rerouted, _ in work:
        expected = reroute_reference(weights, ids, similarity, primary_top_k=1, threshold=0.5)
        assert torch.equal(rerouted.cpu(), expected)


def test_a_launch_allocates_nothing_and_does_not_synchronize(device):
    captured = Captured(device, num_rows=32, num_experts=128, top_k=8, dtype=torch.int32)
    captured.launch()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        captured.launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations


def test_first_call_of_the_op_inside_a_capture_is_an_error(device):
    weights, ids, similarity = torch.rand(8, 4), torch.randint(0, 16, (8, 4)), torch.rand(16, 16)
    tensors = [tensor.to(device) for tensor in (weights, ids, similarity)]
    with pytest.raises(RuntimeError, match="before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        reroute_topk(*tensors, primary_top_k=1, threshold=0.5)


SANITIZED = """
import torch
from sere.ops.kernels import cuda
from tests.ops.kernels.kernel_checks import check_policy_step, check_reroute
from tests.ops.kernels.policy_examples import some_policy_steps
from tests.ops.strategies import Step
device = torch.device("cuda", 0)
cuda.warm_up(device)
generator = torch.Generator().manual_seed(0)
for num_tokens, num_experts, top_k in [(1, 1, 1), (33, 65, 17), (64, 128, 8), (300, 512, 10), (40, 1024, 32)]:
    weights, ids = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k)
    for dtype in (torch.int32, torch.int64):
        similarity = torch.rand(num_experts, num_experts, generator=generator)
        roles = torch.randint(0, 3, (num_tokens,), generator=generator, dtype=torch.int8)
        step = Step(weights, ids.to(dtype), similarity, roles, primary_top_k=1, threshold=0.3)
        check_reroute(step, dict(in_place=True, counted=True, left_alone=False, neutral=False), device)
mode = dict(counted=True, left_alone=False, differences=True, ties=False, dtype=torch.bfloat16)
for policy_step in some_policy_steps():
    check_policy_step(policy_step, mode, device)
print("all equal")
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(device, tool):
    # Only our kernels: torch's own would take hours. Calls that torch makes to see whether they fail are not errors.
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=sere_"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]
    result = subprocess.run([*command, sys.executable, "-c", SANITIZED], capture_output=True, text=True, timeout=500)
    report = result.stdout + result.stderr
    assert result.returncode == 0 and "all equal" in report, report[-5000:]


def test_padding_rows_do_not_vote(device):
    """What makes captured graphs of padded batches right."""
    captured = Captured(device, num_rows=16, num_experts=60, top_k=4, dtype=torch.int32)
    captured.step([1] * 6, torch.Generator().manual_seed(4))
    assert (captured.roles.roles[6:16] == PADDING).all() and (captured.roles.roles[:6] == DECODE).all()
