"""What the benchmark scripts refuse, check and write; nothing here is a measurement."""

import importlib
import json
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch

from sere.ops.kernels import compile, cuda
from tests.conftest import ROOT
from tests.ops.kernels.shim import SANITIZERS, cuda_on_cpu, needs_compiler


@pytest.fixture
def script(monkeypatch):
    """Imports a script by name, and gives it command line arguments."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))

    def load(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        return importlib.import_module(name)

    return load


def refused(capsys, main):
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_dot_in_the_name_of_a_report(script, tmp_path):
    out = tmp_path / "decode-0.32"
    script("benchmark").report("Title", ["line"], out, rows=[1])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["decode-0.32.json", "decode-0.32.md"]
    assert json.loads((tmp_path / "decode-0.32.json").read_text())["rows"] == [1]
    assert (tmp_path / "decode-0.32.md").read_text().startswith("# Title")


def test_commit_of_this_repository_wherever_the_script_runs(script, tmp_path, monkeypatch):
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    monkeypatch.chdir(tmp_path)
    assert script("benchmark").environment().endswith(f"commit {commit or 'unknown'}")


def test_wrong_arguments(script, capsys, monkeypatch):
    bench = script("bench_reroute", "--device", "cpu", "--top-k", "9", "--experts", "8")
    assert "--top-k: at most --experts, 8, got 9" in refused(capsys, bench.main)
    script("bench_reroute", "--device", "cpu", "--out", ".")
    assert "a file name without its ending is needed, got '.'" in refused(capsys, bench.main)
    script("bench_reroute", "--device", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert compile.install_line() in refused(capsys, bench.main)


def test_reroute_on_the_cpu(script, tmp_path):
    sizes = [
        "--tokens",
        "4",
        "--experts",
        "8",
        "--top-k",
        "2",
        "--primary-top-k",
        "1",
        "--hidden",
        "16",
        "--intermediate",
        "16",
    ]
    script("bench_reroute", "--device", "cpu", "--repeats", "20", "--out", str(tmp_path / "report"), *sizes).main()
    assert json.loads((tmp_path / "report.json").read_text())["rows"]["re-route"]["median"] > 0


@needs_compiler
@pytest.mark.parametrize("wrong_way", [None, "kernel", "kernel, counting", "recipe"])
def test_every_layer_is_checked_before_anything_is_timed(script, monkeypatch, wrong_way):
    bench = script("bench_reroute")
    calls, timed, reroute, recipe = [], [], cuda.reroute, bench.recipe

    def is_wrong(way):
        """Whether this is the call for layer 17 of the way that shall be wrong."""
        calls.append(way)
        return way == wrong_way and calls.count(way) == 18

    def reroute_unless_wrong(*args, **kwargs):
        if not is_wrong("kernel" if kwargs["counters"] is None else "kernel, counting"):
            reroute(*args, **kwargs)

    monkeypatch.setattr(cuda, "reroute", reroute_unless_wrong)
    monkeypatch.setattr(bench, "recipe", lambda *args: recipe(*args) - int(is_wrong("recipe")))
    monkeypatch.setattr(bench, "time_graph", lambda body, repeats: timed.append(body))
    with cuda_on_cpu(*SANITIZERS):
        arguments = dict(device=torch.device("cpu"), repeats=1)
        if wrong_way is None:
            found = list(bench.bench_shape(5, 16, 4, 1, **arguments))
            assert found == ["kernel", "kernel, counting", "recipe", "own and copies", "copies"]
            assert len(timed) == 5
        else:
            with pytest.raises(SystemExit, match=rf"the {wrong_way} differs .*layer 17: nothing is timed"):
                bench.bench_shape(5, 16, 4, 1, **arguments)
            assert not timed


def test_decode_re_routes_every_batch_it_times(script, monkeypatch):
    """max_tokens, the plugin's bound on the rows of a step, follows --batches."""
    import vllm

    bench = script("bench_decode")
    seen = {}

    class NoEngine(Exception):
        pass

    def llm(**arguments):
        seen.update(arguments)
        raise NoEngine

    monkeypatch.setattr(vllm, "LLM", llm)
    for batches, max_tokens in (([1, 8], 1024), ([2048, 4], 2048)):
        with pytest.raises(NoEngine):
            bench.Bench(Namespace(batches=batches, variants=[1], steps=12, layers=1))
        assert seen["additional_config"]["sere"]["max_tokens"] == max_tokens


def test_orderings_are_permutations_of_the_rows(script):
    orderings = script("row_orderings")
    rows = [{"prompt": "x" * (1 + n % 3), "reference": "y" * (n % 5), "task": "abc"[n % 3]} for n in range(18)]
    noise = np.random.default_rng(0).random((18, 4)) / 100
    alike = noise + np.eye(4)[[n % 3 for n in range(18)]]
    made = orderings.make_orderings(rows, dict.fromkeys(("prompt mean", "prompt last", "answer mean"), alike), num_seeds=2)
    assert all(sorted(make(4)) == list(range(18)) for seeds in made.values() for make in seeds)
    assert len(made["random"]) == 2
    batches = {name: [{n % 3 for n in seeds[0](6)[start : start + 6]} for start in (0, 6, 12)] for name, seeds in made.items()}
    for name in ("task", "prompt length", "router, prompt mean: clusters", "router, last token: leaf order"):
        assert all(len(tasks) == 1 for tasks in batches[name]), name
    assert all(len(tasks) == 3 for tasks in batches["round robin over tasks"])


def test_active_experts_at_equal_rows(script):
    """A batch that stays full has more active experts per step; at equal rows it has those of the baseline."""
    equal = script("bench_ordering").at_equal_rows
    baseline = [{"curve": {1: [10, 8.0, 8.0], 3: [30, 12.0, 6.0]}}]
    full = [{"curve": {1: [1, 8.0, 8.0], 2: [1, 10.0, 7.0], 3: [98, 12.0, 6.0]}}]
    assert equal(baseline, baseline, 1) == equal(full, baseline, 1) == 11.0
    assert equal(full, baseline, 2) == 6.5


def test_ordering_needs_an_artifact(script, capsys, tmp_path):
    bench = script("bench_ordering", "--similarity", str(tmp_path / "none.safetensors"))
    assert "make one with sere calibrate" in refused(capsys, bench.main)
