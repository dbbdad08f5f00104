"""The kernels as NVRTC compiles them for GPUs that need not be here: no warnings, no spills; prints the use of resources."""

import re
import shutil
import subprocess

import pytest

from sere.ops.kernels.compile import COMPILE_OPTIONS, source_text
from tests.ops.kernels import nvrtc
from tests.ops.kernels.shim import KERNELS

# All four for every kernel take minutes; the two in between are alike.
ARCHITECTURES = ["sm_80", *(pytest.param(name, marks=pytest.mark.long) for name in ("sm_90", "sm_100")), "sm_120"]
# A policy's kernel is compiled for the layer's number of experts, and has fewer threads where there are many.
SOURCES = [
    *(("reroute.cu", options, 1024) for options in ((), ("-DTOPK_INT64",))),
    *(
        ("route.cu", (f"-DEXPERTS_PER_LANE={size}", *options), 1024 if size <= 8 else 512)
        for size in (4, 8, 16, 32)
        for options in ((), ("-DTOPK_INT64",))
    ),
    ("token_roles.cu", (), 1024),
    ("compensate.cu", (), 256),
]
NAMES = [" ".join((source, *options)) for source, options, _ in SOURCES]
_REGISTERS = 65536


def check_report(report: str, label: str, num_threads: int) -> None:
    kernels = re.findall(r"Used (\d+) registers", report)
    shared = re.findall(r"(\d+) bytes smem", report)
    assert kernels, report
    assert report.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == len(kernels), report
    assert not re.search(r"[1-9]\d* bytes stack frame", report)
    assert not re.search(r"warning", report, re.IGNORECASE), report
    # What a block of so many threads can have.
    assert all(int(registers) * num_threads <= _REGISTERS for registers in kernels)
    print(f"{label}: {', '.join(kernels)} registers, {', '.join(shared) or 0} bytes of shared memory, no spills")


@pytest.mark.skipif(nvrtc.library() is None, reason="NVRTC is not installed (pip install nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("source", "options", "num_threads"), SOURCES, ids=NAMES)
def test_nvrtc(source, options, num_threads, architecture):
    flags = (*COMPILE_OPTIONS, *options, f"--gpu-architecture={architecture}", "--ptxas-options=-v")
    cubin, report = nvrtc.compile_to_cubin(source, source_text(KERNELS / source), flags)
    assert cubin[:4] == b"\x7fELF"
    check_report(report, f"{nvrtc.version()} {architecture} {source} {' '.join(options)}", num_threads)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("source", "options", "num_threads"), [case for case in SOURCES if "-DTOPK_INT64" not in case[1]])
def test_nvcc(source, options, num_threads, architecture, tmp_path):
    command = ["nvcc", *COMPILE_OPTIONS, *options, f"-arch={architecture}", "-cubin", "-Xptxas=-v", "-Werror=all-warnings"]
    result = subprocess.run([*command, KERNELS / source, "-o", tmp_path / "out.cubin"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    check_report(result.stderr, f"nvcc {architecture} {source} {' '.join(options)}", num_threads)
