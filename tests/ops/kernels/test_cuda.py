"""The CUDA kernels on the CPU: the same sources, run against the reference under sanitizers (see cuda_on_cpu/cuda.h)."""

import pytest
import torch
from hypothesis import given, settings

from sere.ops import op as reroute
from sere.ops.kernels import cuda
from sere.ops.kernels.counting import COUNTERS
from sere.ops.kernels.neighbours import sorted_neighbours
from sere.ops.reference import DECODE, PADDING, reroute_reference
from tests.examples import examples
from tests.ops.kernels.kernel_checks import (
    batches,
    check_policy_step,
    check_reroute,
    check_token_roles,
    modes,
)
from tests.ops.kernels.policy_examples import some_policy_steps
from tests.ops.kernels.shim import SANITIZERS, cuda_on_cpu, needs_compiler
from tests.ops.strategies import Step, steps

CPU = torch.device("cpu")
pytestmark = [needs_compiler, pytest.mark.slow]
in_bounds = settings(deadline=None, database=None)


@pytest.fixture(scope="module")
def shims():
    with cuda_on_cpu(*SANITIZERS) as shims:
        yield shims


@settings(in_bounds, max_examples=examples(1000))
@given(step=steps(max_tokens=80, max_experts=200), mode=modes())
def test_equals_reference(shims, step: Step, mode):
    check_reroute(step, mode, CPU)


@settings(in_bounds, max_examples=examples(60))
@given(step=steps(max_tokens=1100, max_experts=1024, max_top_k=32), mode=modes())
def test_equals_reference_at_all_sizes(shims, step: Step, mode):
    check_reroute(step, mode, CPU)


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 1, 1), (1024, 1024, 32), (33, 65, 17), (3, 1023, 31)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bounds(shims, num_tokens, num_experts, top_k, dtype):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    weights, ids = scores.topk(top_k)
    step = Step(
        topk_weights=weights,
        topk_ids=ids.to(dtype),
        similarity=torch.rand(num_experts, num_experts, generator=generator),
        roles=None,
        primary_top_k=1,
        threshold=0.9,
    )
    check_reroute(step, dict(in_place=False, counted=True, left_alone=False, neutral=False), CPU)


@settings(in_bounds, max_examples=examples(200))
@given(step=steps(max_tokens=40, max_experts=60))
def test_what_the_custom_op_does_on_a_gpu(shims, step: Step):
    """Twice: the second call takes the neighbours that the first one sorted."""
    arguments = (step.topk_weights, step.topk_ids.T.contiguous().T, step.similarity)
    settings_ = dict(primary_top_k=step.primary_top_k, threshold=step.threshold, roles=step.roles)
    expected = reroute_reference(*arguments, **settings_)
    for _ in range(2):
        actual = reroute._reroute_topk_cuda(*arguments, *settings_.values())
        assert torch.equal(actual, expected)
    step.similarity.fill_(1)
    expected = reroute_reference(*arguments, **settings_)
    assert torch.equal(reroute._reroute_topk_cuda(*arguments, *settings_.values()), expected), "a changed matrix is sorted anew"


def test_a_similarity_whose_changes_cannot_be_seen_is_refused(shims):
    weights, ids, similarity = torch.rand(8, 4), torch.randint(0, 16, (8, 4)), torch.rand(16, 16)
    with torch.inference_mode():
        reroute._reroute_topk_cuda(weights, ids, similarity, 1, 0.5, None)
        with pytest.raises(ValueError, match=r"made in inference mode.*outside"):
            reroute._reroute_topk_cuda(weights, ids, similarity.clone(), 1, 0.5, None)


@settings(in_bounds, max_examples=examples(300))
@given(batch=batches())
def test_token_roles(shims, batch):
    check_token_roles(batch, CPU)


def test_thousands_of_cases_ran(shims):
    """That the tests above did run the kernels, and how often."""
    print(f"{shims.num_launches} launches")
    assert shims.num_launches > 1500


def test_ids_out_of_range_are_unused_slots(shims):
    """A router that returns nonsense for a row (of a broken model, say) must not make the kernel write elsewhere."""
    ids = torch.tensor([[0, 5, 1_000_000], [2**31 - 1, -(2**31), 3]], dtype=torch.int32)
    new_ids = ids.clone()
    cuda.reroute(
        torch.tensor([[0.5, 0.3, 0.9], [0.9, 0.8, 0.2]]),
        new_ids,
        sorted_neighbours(torch.ones(6, 6), 0.0),
        num_experts=6,
        primary_top_k=1,
        new_ids=new_ids,
    )
    assert new_ids.tolist() == [[0, 0, 1_000_000], [2**31 - 1, -(2**31), 3]]


def test_warm_up(shims, monkeypatch):
    cuda.warm_up(CPU)
    # As when vLLM loads a model: whatever does not name its device and type gets others.
    torch.set_default_dtype(torch.bfloat16)
    try:
        similarity = torch.rand(9, 9, dtype=torch.float32)
        with torch.device("meta"):
            cuda.warm_up(CPU)
            assert sorted_neighbours(similarity, 0.5).device == CPU
    finally:
        torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(cuda, "sorted_neighbours", lambda similarity, threshold: torch.zeros(60, 64, dtype=torch.int16))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    with pytest.raises(RuntimeError, match="wrong results on a GPU"):
        cuda.warm_up(CPU)


def test_no_data_races():
    """Real threads under the thread sanitizer: no access to shared memory without a barrier between."""
    with cuda_on_cpu("-fsanitize=thread", "-DREAL_THREADS") as shims:
        try:
            cuda.warm_up(CPU)
        except AssertionError as error:
            if "unexpected memory mapping" in str(error):
                pytest.skip("the thread sanitizer does not run on this kernel's memory layout")
            raise
        generator = torch.Generator().manual_seed(1)
        for num_tokens, num_experts, top_k in [(40, 16, 4), (9, 30, 5), (70, 8, 8), (200, 12, 2)]:
            scores = torch.rand(num_tokens, num_experts, generator=generator)
            weights, ids = scores.topk(top_k)
            roles = torch.randint(0, 3, (num_tokens,), generator=generator, dtype=torch.int8)
            similarity = torch.rand(num_experts, num_experts, generator=generator)
            step = Step(weights, ids, similarity, roles, primary_top_k=1, threshold=0.3)
            check_reroute(step, dict(in_place=True, counted=True, left_alone=False, neutral=False), CPU)
        mode = dict(counted=True, left_alone=False, differences=True, ties=False, dtype=torch.bfloat16)
        for policy_step in some_policy_steps():
            check_policy_step(policy_step, mode, CPU)
        for shim in shims.values():
            report = shim.close()
            assert "ThreadSanitizer" not in report, report


def broken(tmp_path, monkeypatch, changed, kernel_line, replacement):
    """The kernels with one line changed."""
    from tests.ops.kernels import shim

    for source in shim.KERNELS.iterdir():
        text = source.read_text()
        if source.name == changed:
            assert text.count(kernel_line) == 1, f"{kernel_line!r} is no longer in the kernel"
            text = text.replace(kernel_line, replacement)
        (tmp_path / source.name).write_text(text)
    monkeypatch.setattr(shim, "KERNELS", tmp_path)
    monkeypatch.setattr(shim, "build", shim.build.__wrapped__)


def test_the_sanitizers_see_what_they_are_for(tmp_path, monkeypatch):
    """Kernels that read one value too far, and some whose threads wait for each other in different places."""
    changes = [
        ("reroute.cu", "exists ? topk_weights[index] : 0", "exists ? topk_weights[index + 1] : 0", "heap-buffer-overflow"),
        ("reroute.cu", "    if (idle) return;\n", "    if (thread == 7) return;\n", "divergence"),
        ("router.cuh", "min(i * WARP + lane, router.num_experts - 1)", "i * WARP + lane", "heap-buffer-overflow"),
        ("votes.cuh", "if (votes.by_selection) {", "if (slot == 3) {", "divergence"),
    ]
    for number, (source, line, replacement, report) in enumerate(changes):
        folder = tmp_path / str(number)
        folder.mkdir()
        with monkeypatch.context() as patch:
            broken(folder, patch, source, line, replacement)
            with cuda_on_cpu(*SANITIZERS), pytest.raises(AssertionError, match=report):
                cuda.warm_up(CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(topk_weights=torch.rand(4, 3, dtype=torch.float64)), "topk_weights must be contiguous torch.float32"),
        (dict(topk_ids=torch.zeros(3, 4, dtype=torch.int32).T), "with strides"),
        (dict(roles=torch.zeros(3, dtype=torch.int8)), r"roles must be contiguous torch.int8 \[4\]"),
        (dict(num_experts=9), "neighbours must be those of 9 experts"),
        (dict(num_experts=2000), "at most 1024 experts"),
        (dict(counters=torch.zeros(len(COUNTERS), dtype=torch.int64)), "counters need step"),
        (dict(primary_top_k=0), "primary_top_k must be at least 1, got 0"),
        (dict(neighbours=torch.zeros(8, dtype=torch.int16)), r"neighbours must be contiguous torch.int16 \[any, any\]"),
        (dict(neighbours=torch.zeros(8, 63, dtype=torch.int16)), "neighbours must be those of 8 experts"),
        (dict(neighbours=torch.zeros(8 * 64 + 1, dtype=torch.int16)[1:].view(8, 64)), "multiple of 16 bytes.*clone"),
    ],
)
def test_refuses_what_the_kernel_cannot_read(change, message):
    ids = torch.zeros(4, 3, dtype=torch.int32)
    arguments = dict(
        topk_weights=torch.rand(4, 3),
        topk_ids=ids,
        neighbours=sorted_neighbours(torch.rand(8, 8), 0.5),
        num_experts=8,
        primary_top_k=1,
        new_ids=ids,
    )
    with pytest.raises(ValueError, match=message):
        cuda.reroute(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(query_start_loc=torch.tensor([0, 1, 2])),
            r"query_start_loc must be contiguous torch.int32 \[any\].*got torch.int64",
        ),
        (dict(query_start_loc=torch.zeros(6, dtype=torch.int32)[::2]), "with strides"),
        (dict(query_start_loc=torch.zeros(2, 2, dtype=torch.int32)), r"got torch.int32 \[2, 2\]"),
        (dict(query_start_loc=torch.zeros(1, dtype=torch.int32)), r"at least 2 values \(one sequence\), got 1"),
        (dict(query_start_loc=torch.zeros(0, dtype=torch.int32)), r"at least 2 values \(one sequence\), got 0"),
        (dict(roles=torch.zeros(8, dtype=torch.int32)), "roles must be contiguous torch.int8"),
        (dict(roles=torch.zeros(16, dtype=torch.int8)[::2]), "with strides"),
        (dict(step=torch.zeros(2, dtype=torch.int64)), r"step must be contiguous torch.int64 \[3\]"),
        (dict(step=torch.zeros(3, dtype=torch.int32)), r"step must be contiguous torch.int64 \[3\]"),
        (dict(step=torch.zeros(3, dtype=torch.int64, device="meta")), "on cpu, got .* on meta"),
    ],
)
def test_refuses_roles_that_the_kernel_cannot_fill(shims, change, message):
    arguments = dict(
        query_start_loc=torch.tensor([0, 1, 2], dtype=torch.int32),
        roles=torch.zeros(8, dtype=torch.int8),
        step=torch.zeros(3, dtype=torch.int64),
    )
    limits = dict(decode_length=1, min_tokens=1, max_tokens=8)
    launches = shims.num_launches
    with pytest.raises(ValueError, match=message):
        cuda.fill_roles(**{**arguments, **change}, **limits)
    assert shims.num_launches == launches
    cuda.fill_roles(**arguments, **limits)
    assert arguments["roles"].tolist() == [DECODE] * 2 + [PADDING] * 6
