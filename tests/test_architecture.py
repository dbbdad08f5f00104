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
    "calibration_jobs": {"calibration_jobs", "ops", "conf"},
    "pipeline": {"pipeline", "calibration_jobs", "ops", "conf"},
}
# What few files may import.
USERS = {"mlflow": ["calibration_jobs/mlflow_store.py", "calibration_jobs/tracking.py"], "omegaconf": ["conf/load.py"]}
FILES = sorted(file for package in ALLOWED for file in (ROOT / package).rglob("*.py"))


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file):
    names, place = set(imported(file)), file.relative_to(ROOT).as_posix()
    assert names & set(ALLOWED) <= ALLOWED[place.split("/")[0]]
    assert not names & {"tests", "scripts"}
    for package, users in USERS.items():
        assert package not in names or place in users
    if place.startswith("ops/"):
        assert not names & {"ray", "mlflow", "datasets", "omegaconf"}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import pipeline, pipeline.cli", ["vllm", "cupy", "torch", "mlflow", "ray", "transformers"]),
        ("import conf.schema", ["vllm", "torch", "omegaconf", "yaml"]),
        (
            "import ops.reroute, ops.policies, ops.stats, ops.similarity, ops.cuda",
            ["vllm", "ray", "mlflow", "transformers", "cupy"],
        ),
        ("import ops.vllm_plugin", ["vllm", "ray", "mlflow"]),
        ("import calibration_jobs.tracking", ["vllm", "torch", "mlflow", "ray"]),
        ("import calibration_jobs.job", ["vllm", "mlflow", "ray", "transformers", "matplotlib", "scipy", "datasets"]),
        ("import pipeline.generate, pipeline.report", ["vllm", "torch", "mlflow", "ray", "matplotlib"]),
    ],
)
def test_imports_are_lazy(statement, absent):
    code = f"{statement}\nimport sys\nprint([name for name in {absent!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
