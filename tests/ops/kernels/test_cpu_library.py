"""How the library of the CPU path is made and found, and that it stays within its tensors."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sere.conf.schema import RerouteConfig
from sere.ops.kernels import cpu_library
from sere.ops.policies.policy import LayerInfo, Policy
from sere.ops.policies.scoring import Scoring
from sere.ops.reference import DECODE
from tests.conftest import ROOT

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """Libraries lie in folders of the test, and compiling one takes no time."""
    library = cpu_library.library()
    assert library is not None

    def copy(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library._name, path)

    found = [tmp_path / "first", tmp_path / "second"]
    monkeypatch.setattr(cpu_library, "_folders", lambda: iter(found))
    monkeypatch.setattr(cpu_library, "compile_library", copy)
    cpu_library._library.cache_clear()
    yield found
    cpu_library._library.cache_clear()


@needs_compiler
def test_a_library_is_found_again(folders, monkeypatch):
    assert isinstance(cpu_library.library(), ctypes.PyDLL)
    cpu_library._library.cache_clear()
    monkeypatch.setattr(cpu_library, "compile_library", None)
    assert cpu_library.library() is not None


@needs_compiler
def test_a_damaged_library_is_made_anew(folders):
    folders[0].mkdir()
    path = folders[0] / f"step-{cpu_library._digest()}.so"
    path.write_bytes(b"cut short")
    assert isinstance(cpu_library.library(), ctypes.PyDLL)
    assert path.stat().st_size > 10_000 and not folders[1].exists()


@needs_compiler
def test_a_folder_that_cannot_be_written_is_passed_over(folders):
    folders[0].write_text("a file where the folder would be")
    assert isinstance(cpu_library.library(), ctypes.PyDLL)
    assert len(list(folders[1].iterdir())) == 1


@needs_compiler
def test_compiling_leaves_a_whole_file_or_none(tmp_path):
    path = tmp_path / "made" / "step.so"
    with pytest.raises(subprocess.CalledProcessError):
        cpu_library.compile_library(path, "--no-such-flag")
    assert not list(path.parent.iterdir())
    cpu_library.compile_library(path, "-O0")
    assert list(path.parent.iterdir()) == [path]
    assert isinstance(cpu_library.load(path), ctypes.PyDLL)


@pytest.mark.parametrize("compiler", [None, "/bin/false"])
def test_where_it_cannot_be_made_torch_does_it_and_one_line_says_so(monkeypatch, tmp_path, compiler):
    lines: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
    monkeypatch.setattr(cpu_library, "_folders", lambda: iter([tmp_path]))
    # No compiler, or one that fails.
    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    cpu_library._library.cache_clear()
    cpu_library.logger.addHandler(handler)
    layer = LayerInfo(
        index=0,
        num_experts=16,
        top_k=4,
        renormalize=True,
        device=torch.device("cpu"),
        scoring=Scoring(function="softmax"),
    )
    try:
        policies = [Policy(RerouteConfig(policy="oea"), layer) for _ in range(3)]
    finally:
        cpu_library.logger.removeHandler(handler)
        cpu_library._library.cache_clear()
    assert all(policy.fast is None for policy in policies)
    (line,) = lines
    assert "install g++" in line and ("no C++ compiler" in line) == (compiler is None)
    logits = torch.randn(8, 16)
    weights, ids = logits.softmax(-1).topk(4)
    _, new_ids = policies[0].route_and_count(weights, ids, logits, torch.full((8,), DECODE, dtype=torch.int8))
    assert new_ids.unique().numel() < ids.unique().numel() or torch.equal(new_ids, ids)


_SANITIZED = """
import sys
from pathlib import Path
from sere.ops.kernels import cpu, cpu_library
flags = ("-g", "-O1", "-Wall", "-Wextra", "-Werror", "-D_GLIBCXX_ASSERTIONS", "-fno-sanitize-recover=all")
path = Path(sys.argv[1]) / "sanitized.so"
cpu_library.compile_library(path, *flags, "-fsanitize=address,undefined")
found = cpu_library.load(path)
cpu.library = lambda: found
from tests.ops.kernels import test_cpu
test_cpu.test_equals_the_reference()
test_cpu.test_reads_bfloat16_logits()
test_cpu.test_threads_may_share_a_layer()
test_cpu.test_padding_rows_may_hold_anything()
print("clean")
"""


@needs_compiler
@pytest.mark.slow
def test_under_the_sanitizers(tmp_path):
    """Every access of the library within its tensors, no undefined behaviour, no warning."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        # What Python and torch keep is none of the library's; vectors of theirs are not annotated.
        "ASAN_OPTIONS": "detect_leaks=0:detect_container_overflow=0",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", _SANITIZED, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-3000:]
