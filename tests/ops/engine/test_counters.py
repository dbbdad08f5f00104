"""Counter files: across workers, and after a process was killed."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from sere.ops.engine.counters import CounterFile, read_counters, summarize
from sere.ops.kernels.counting import COUNTERS


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
    rows |= dict(pure_steps=5, pure_active_experts_before=80, pure_active_experts_after=20)
    for layer, (before, after) in enumerate([(100, 50), (200, 60)]):
        values = {**rows, "active_experts_before": before, "active_experts_after": after}
        counters.counts[layer] = torch.tensor([values[name] for name in COUNTERS])
    found = read_counters(tmp_path)
    expected = dict(
        decode_steps=10,
        rerouting_steps=8,
        decode_rows_per_step=4,
        active_experts_before=15,
        active_experts_after=5.5,
        saved_share=190 / 300,
        mixed_step_share=0.2,
        decode_only_active_experts_before=(300 - 120) / 16,
        decode_only_active_experts_after=(110 - 60) / 16,
        rerouted_share=0.25,
        critical_share=0.1,
        rerouting_active_experts_before=16,
        rerouting_active_experts_after=4,
        rerouting_saved_share=0.75,
    )
    assert summarize(found) == pytest.approx(expected)
    assert summarize([]) == {}

    for layer in found:
        # As an earlier version counted.
        for name in ("pure_steps", "pure_active_experts_before", "pure_active_experts_after"):
            del layer.counts[name]
    for name in ("rerouting_active_experts_before", "rerouting_active_experts_after", "rerouting_saved_share"):
        del expected[name]
    assert summarize(found) == pytest.approx(expected)
