"""The wheel holds everything, and works where there is no checkout."""

import tomllib
import zipfile

from tests.conftest import ROOT
from tests.packaging.conftest import PACKAGES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REROUTE = """
import torch, sere.ops
from sere.ops.reference import reroute_reference
weights, ids = torch.tensor([[0.6, 0.4], [0.9, 0.1]]), torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)
similarity = torch.tensor([[1.0, 0.2, 0.3], [0.2, 1.0, 0.8], [0.3, 0.8, 1.0]])
new = sere.ops.reroute_topk(weights, ids, similarity, primary_top_k=1, threshold=0.5)
assert torch.equal(new, reroute_reference(weights, ids, similarity, primary_top_k=1, threshold=0.5))
print(new.tolist(), sere.ops.__file__)
"""


def test_every_package_is_listed():
    found = {
        f"sere.{file.parent.relative_to(ROOT).as_posix().replace('/', '.')}"
        for name in PACKAGES
        for file in (ROOT / name).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_file_is_in_the_wheel(wheel):
    files = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()}
    files = {file for file in files if "__pycache__" not in file}
    inside = {name.removeprefix("sere/") for name in zipfile.ZipFile(wheel).namelist() if name.startswith("sere/")}
    assert inside == files
    suffixes = {file.rpartition(".")[2] for file in inside}
    assert {"py", "yaml", "cu", "css", "jinja"} <= suffixes


def test_command(installed, run):
    sere = installed.with_name("sere")
    shown = run(sere, "--help").stdout
    assert all(word in shown for word in ("calibrate", "generate", "sweep", "compare"))
    assert run(sere, "--version").stdout == f"sere {PROJECT['project']['version']}\n"


def test_reroute(installed, run):
    ids, file = run(installed, "-c", REROUTE).stdout.rsplit(" ", 1)
    assert ids == "[[0, 2], [2, 0]]"
    assert file.startswith(str(installed.parent.parent))
