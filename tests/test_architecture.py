"""The house: arrows point one way, rooms are small, one user per package, and importing is cheap."""

import ast
import re
import subprocess
import sys
from collections import Counter

import pytest

from tests.conftest import ROOT

# What each package may import of the project.
ALLOWED = {
    "conf": {"conf"},
    "ops": {"ops", "conf"},
    "pipeline": {"pipeline", "ops", "conf"},
    "calibration_jobs": {"calibration_jobs", "pipeline", "ops", "conf"},
}
# What few may import: a file, or a room.
USERS = {"mlflow": "pipeline/tracking/", "omegaconf": "conf/load.py"}
FILES = sorted(file for package in ALLOWED for file in (ROOT / package).rglob("*.py"))
TREES = {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text()) for file in FILES}
each_file = pytest.mark.parametrize("place", TREES)


def imported(tree):
    """The modules that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@each_file
def test_imports_point_one_way(place):
    names = set(imported(TREES[place]))
    ours = {name.split(".")[1] for name in names if name.startswith("sere.")}
    assert ours <= ALLOWED[place.split("/")[0]]
    packages = {name.split(".")[0] for name in names}
    assert not packages & {"tests", "scripts", *ALLOWED}, "the packages are called sere.PACKAGE"
    for package, user in USERS.items():
        assert package not in packages or place.startswith(user)
    if place.startswith("ops/"):
        assert not packages & {"ray", "mlflow", "datasets", "omegaconf"}


def test_no_module_imports_itself_through_others():
    """Imports inside functions count, too: they are there for heavy packages, not to hide a circle."""
    modules = {
        "sere." + place.removesuffix(".py").removesuffix("/__init__").replace("/", "."): tree for place, tree in TREES.items()
    }

    def typing_only(tree):
        """What is imported for annotations alone is no import."""
        blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
        return {name for block in blocks for name in imported(block)}

    arrows = {
        name: {other for other in imported(tree) if other in modules and other != name} - typing_only(tree)
        for name, tree in modules.items()
    }
    # Modules that nothing left imports cannot be in a circle.
    while free := {name for name, others in arrows.items() if not others & set(arrows)}:
        arrows = {name: others for name, others in arrows.items() if name not in free}
    assert not arrows, "in a circle, or before one"


def test_rooms_are_small():
    rooms = Counter(file.parent for file in FILES if file.name != "__init__.py")
    assert not {room: number for room, number in rooms.items() if number > 13}
    long = {place: len((ROOT / place).read_text().splitlines()) for place in TREES}
    assert not {place: number for place, number in long.items() if number > 300}


@each_file
def test_docstrings_begin_with_a_summary(place):
    for node in ast.walk(TREES[place]):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            assert not re.match(r"(Args|Raises|Returns|Yields|Attributes):", text), node.name


@each_file
def test_the_environment_is_read_at_the_entry_point_only(place):
    """Setting a variable for a package that is about to be imported is no reading."""
    source = (ROOT / place).read_text()
    reads = re.findall(r"os\.(?:getenv|environ(?!\.(?:setdefault|update)\()).*", source)
    assert not reads or place == "pipeline/cli.py"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import sere.pipeline, sere.pipeline.cli", ["vllm", "cupy", "torch", "mlflow", "ray", "transformers"]),
        ("import sere.pipeline.commands, sere.calibration_jobs.commands", ["vllm", "torch", "mlflow", "ray", "rich", "yaml"]),
        ("import sere.conf.schema", ["vllm", "torch", "omegaconf", "yaml"]),
        ("import sere.ops, sere.ops.policies, sere.ops.engine, sere.ops.kernels", ["torch", "vllm", "cupy"]),
        (
            "import sere.ops.op, sere.ops.policies.policy, sere.ops.engine.counters, sere.ops.similarity",
            ["vllm", "ray", "mlflow", "transformers", "cupy"],
        ),
        # A machine with torch, CuPy, pytest and hypothesis runs these.
        ("import tests.gpu.test_cuda", ["vllm", "ray", "mlflow", "transformers", "omegaconf", "yaml", "pyarrow", "cupy"]),
        ("import sere.ops.engine.plugin", ["vllm", "ray", "mlflow"]),
        ("import sere.pipeline.tracking.tracker", ["vllm", "torch", "mlflow", "ray"]),
        ("import sere.calibration_jobs.job", ["vllm", "mlflow", "ray", "transformers", "matplotlib", "scipy", "datasets"]),
        ("import sere.pipeline.generate.driver", ["vllm", "torch", "mlflow", "ray"]),
        ("import sere.pipeline.compare.page", ["vllm", "torch", "mlflow", "ray", "matplotlib"]),
    ],
)
def test_imports_are_lazy(statement, absent):
    code = f"{statement}\nimport sys\nprint([name for name in {absent!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
