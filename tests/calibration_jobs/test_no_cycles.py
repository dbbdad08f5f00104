"""No module of calibration needs, in whatever way, a module that needs it."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOM = ROOT / "calibration_jobs"
FILES = sorted(ROOM.rglob("*.py"))


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(("sere", *(parts[:-1] if parts[-1] == "__init__" else parts)))


MODULES = {module_of(file) for file in FILES}


def needed(file: Path) -> set[str]:
    """The room's modules that a file imports: at its top, inside functions, and for types only."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # A name in a package may be a module.
            names = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES
            found |= names or {node.module}
    return found & MODULES


def test_no_import_cycle():
    """Nor does an import inside a function hide one."""
    needs = {module_of(file): needed(file) for file in FILES}
    assert sum(map(len, needs.values())) > len(FILES), "imports are seen"
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        pytest.fail(" needs ".join(reversed(error.args[1])))
