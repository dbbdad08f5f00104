"""These tests need a GPU and CuPy, and nothing else but torch, pytest and hypothesis."""

import importlib.util
from pathlib import Path

import pytest
import torch


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA GPU, or torch is a CPU build"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    return None


def pytest_collection_modifyitems(items):
    reason = _missing()
    for item in items:
        if reason and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0)
