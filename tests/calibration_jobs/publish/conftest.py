"""What commands print."""

import io

import pytest
from rich.console import Console


@pytest.fixture
def printed():
    """What a command prints."""
    return Console(file=io.StringIO(), width=200)
