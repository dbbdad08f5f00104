"""Counters: against a plain count, across files, and after a process was killed."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings

from sere.ops.engine.counters import COUNTERS, CounterFile, count_step, read_counters, summarize
from sere.ops.reference import DECODE, PADDING, reroute_reference
from tests.ops.strategies import Step, steps


@settings(max_examples=100, deadline=None)
@given(step=steps(max_tokens=30, max_experts=40, max_top_k=6))
def test_equals_plain_count(step: Step):
    num_tokens, top_k = step.topk_ids.shape
    roles = torch.full((num_tokens,), DECODE, dtype=torch.int8) if step.roles is None else step.roles
    after = reroute_reference(
        step.topk_weights,
        step.topk_ids,
        step.similarity,
        primary_top_k=step.primary_top_k,
        threshold=step.threshold,
        roles=roles,
    )
    num_decode = int((roles == DECODE).sum())
    counters = torch.full((len(COUNTERS),), 100, dtype=torch.int64)
    count_step(
        counters,
        topk_weights=step.topk_weights,
        ids_before=step.topk_ids,
        ids_after=after,
        roles=roles,
        num_decode_rows=torch.tensor(num_decode),
        num_experts=step.similarity.shape[0],
        primary_top_k=step.primary_top_k,
    )
    primary, decode_experts = set(), []
    for row in range(num_tokens):
        used = [slot for slot in range(top_k) if step.topk_ids[row, slot] >= 0]
        used.sort(key=lambda slot: (-step.topk_weights[row, slot].item(), slot))
        if roles[row] != PADDING:
            voting = used[: step.primary_top_k] if roles[row] == DECODE else used
            primary |= {int(step.topk_ids[row, slot]) for slot in voting}
        if roles[row] == DECODE:
            decode_experts += [(int(step.topk_ids[row, slot]), int(after[row, slot])) for slot in used]
    real = roles != PADDING
    expected = dict(
        steps=1,
        rerouting_steps=int(num_decode > 0),
        decode_rows=num_decode,
        decode_slots=num_decode * top_k,
        rerouted_slots=sum(a != b for a, b in decode_experts),
        critical_slots=sum(a == b and a not in primary for a, b in decode_experts),
        active_experts_before=len(set(step.topk_ids[real].flatten().tolist()) - {-1}),
        active_experts_after=len(set(after[real].flatten().tolist()) - {-1}),
    )
    mixed = int(real.sum()) > num_decode
    expected |= dict(
        mixed_steps=int(mixed),
        mixed_active_experts_before=mixed * expected["active_experts_before"],
        mixed_active_experts_after=mixed * expected["active_experts_after"],
    )
    if num_decode == 0:
        expected = dict.fromkeys(COUNTERS, 0)
    assert (counters - 100).tolist() == [expected[name] for name in COUNTERS]


def test_files_of_several_workers_add_up(tmp_path):
    for layers, value in (([0, 1], 1), ([0, 1], 10), ([2], 5)):
        counters = CounterFile(layers=layers, device=torch.device("cpu"), folder=str(tmp_path), manifest={})
        counters.counts.fill_(value)
    counts = read_counters(tmp_path)
    assert [(c.layer, c.counts["steps"]) for c in counts] == [(0, 11), (1, 11), (2, 5)]
    assert read_counters(tmp_path / "nowhere") == []


def test_counts_survive_a_killed_process(tmp_path):
    code = f"""
        import os, signal, torch
        from sere.ops.engine.counters import CounterFile
        file = CounterFile(layers=[0, 3], device=torch.device("cpu"), folder={str(tmp_path)!r}, manifest={{}})
        file.counts[1] += 7
        os.kill(os.getpid(), signal.SIGKILL)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=os.environ)
    assert result.returncode == -signal.SIGKILL
    assert [c.counts["decode_rows"] for c in read_counters(tmp_path)] == [0, 7]


def test_summary_averages_over_steps_and_layers(tmp_path):
    counters = CounterFile(layers=[0, 1], device=torch.device("cpu"), folder=str(tmp_path), manifest={})
    rows = dict(steps=10, rerouting_steps=8, decode_rows=40, decode_slots=80, rerouted_slots=20, critical_slots=8)
    rows |= dict(mixed_steps=2, mixed_active_experts_before=60, mixed_active_experts_after=30)
    for layer, (before, after) in enumerate([(100, 50), (200, 60)]):
        values = {**rows, "active_experts_before": before, "active_experts_after": after}
        counters.counts[layer] = torch.tensor([values[name] for name in COUNTERS])
    summary = summarize(read_counters(tmp_path))
    assert summary == pytest.approx(
        dict(
            decode_steps=10,
            rerouting_steps=8,
            decode_rows_per_step=4,
            active_experts_before=15,
            active_experts_after=5.5,
            mixed_step_share=0.2,
            decode_only_active_experts_before=(300 - 120) / 16,
            decode_only_active_experts_after=(110 - 60) / 16,
            rerouted_share=0.25,
            critical_share=0.1,
        )
    )
    assert summarize([]) == {}
