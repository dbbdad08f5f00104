"""Imports point one way, and importing a package is cheap."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# What each package may import of the project.
ALLOWED = {
    "conf": {"conf"},
    "ops": {"ops", "conf"},
    "calibration_jobs": {"calibration_jobs", "pipeline", "ops", "conf"},
    "pipeline": {"pipeline", "calibration_jobs", "ops", "conf"},
}
# What few files may import.
USERS = {"mlflow": ["pipeline/tracking/store.py", "pipeline/tracking/tracker.py"], "omegaconf": ["conf/load.py"]}
FILES = sorted(file for package in ALLOWED for file in (ROOT / package).rglob("*.py"))


def imported(file):
    """What a file imports: packages by name, the project's as `sere.PACKAGE`."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        yield from (".".join(name.split(".")[: 2 if name.startswith("sere.") else 1]) for name in names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file):
    names, place = set(imported(file)), file.relative_to(ROOT).as_posix()
    ours = {name.removeprefix("sere.") for name in names if name.startswith("sere.")}
    assert ours <= ALLOWED[place.split("/")[0]]
    assert not names & {"tests", "scripts", *ALLOWED}, "the packages are called sere.PACKAGE"
    for package, users in USERS.items():
        assert package not in names or place in users
    if place.startswith("ops/"):
        assert not names & {"ray", "mlflow", "datasets", "omegaconf"}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import sere.pipeline, sere.pipeline.cli", ["vllm", "cupy", "torch", "mlflow", "ray", "transformers"]),
        ("import sere.conf.schema", ["vllm", "torch", "omegaconf", "yaml"]),
        (
            "import sere.ops.op, sere.ops.policies.base, sere.ops.engine.counters, sere.ops.similarity, sere.ops.kernels.cuda",
            ["vllm", "ray", "mlflow", "transformers", "cupy"],
        ),
        ("import sere.ops.engine.plugin", ["vllm", "ray", "mlflow"]),
        ("import sere.pipeline.tracking.tracker", ["vllm", "torch", "mlflow", "ray"]),
        ("import sere.calibration_jobs.job", ["vllm", "mlflow", "ray", "transformers", "matplotlib", "scipy", "datasets"]),
        (
            "import sere.pipeline.generate.driver, sere.pipeline.compare.report",
            ["vllm", "torch", "mlflow", "ray", "matplotlib"],
        ),
    ],
)
def test_imports_are_lazy(statement, absent):
    code = f"{statement}\nimport sys\nprint([name for name in {absent!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
