"""The kernels as NVRTC compiles them for GPUs that need not be here: no warnings, no spills; prints the use of resources."""

import re
import shutil
import subprocess

import pytest

from sere.ops.kernels.compile import COMPILE_OPTIONS
from tests.ops.kernels import nvrtc
from tests.ops.kernels.shim import KERNELS

ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
SOURCES = [("reroute.cu", ()), ("reroute.cu", ("-DTOPK_INT64",)), ("token_roles.cu", ())]


def check_report(report: str, label: str) -> None:
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    shared = re.findall(r"(\d+) bytes smem", report)
    assert len(registers) == 1, report
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    assert not re.search(r"warning", report, re.IGNORECASE), report
    # 64 is what a block of 1024 threads can have.
    assert registers[0] <= 64
    print(f"{label}: {registers[0]} registers, {shared[0]} bytes of shared memory, no spills")


@pytest.mark.skipif(nvrtc.library() is None, reason="NVRTC is not installed (pip install nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("source", "options"), SOURCES, ids=["reroute-int32", "reroute-int64", "token_roles"])
def test_nvrtc(source, options, architecture):
    flags = (*COMPILE_OPTIONS, *options, f"--gpu-architecture={architecture}", "--ptxas-options=-v")
    cubin, report = nvrtc.compile_to_cubin(KERNELS / source, flags)
    assert cubin[:4] == b"\x7fELF"
    check_report(report, f"{nvrtc.version()} {architecture} {source} {' '.join(options)}")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("source", "options"), SOURCES, ids=["reroute-int32", "reroute-int64", "token_roles"])
def test_nvcc(source, options, architecture, tmp_path):
    command = ["nvcc", *COMPILE_OPTIONS, *options, f"-arch={architecture}", "-cubin", "-Xptxas=-v", "-Werror=all-warnings"]
    result = subprocess.run([*command, KERNELS / source, "-o", tmp_path / "out.cubin"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    check_report(result.stderr, f"nvcc {architecture} {source} {' '.join(options)}")
