"""Copies of what is installed, and environments that do not see the checkout."""

import shutil
import subprocess
import sys
import venv

import pytest

from tests.conftest import ROOT

PACKAGES = ("calibration_jobs", "conf", "ops", "pipeline")


def copy_packages(folder):
    """The packages as they are in the checkout, without what running them leaves behind."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


def empty_environment(folder):
    """A fresh environment with nothing in it. Returns its Python."""
    venv.create(folder, with_pip=False)
    return folder / "bin" / "python"


def site_packages(python):
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def run(tmp_path):
    """Runs a Python's command in an empty folder, with no help from the environment variables."""

    def run(*command, check=True, cwd=tmp_path, **options):
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
        result = subprocess.run(
            [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, **options
        )
        if check:
            assert result.returncode == 0, result.stdout + result.stderr
        return result

    return run


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The project's wheel, built from a copy, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    copy_packages(folder / "copy")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / "copy")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    result = subprocess.run([*pip, "--wheel-dir", str(folder), "."], cwd=folder / "copy", capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """Python of an environment with the wheel and this environment's dependencies, where the editable install is not active."""
    python = empty_environment(tmp_path_factory.mktemp("environment"))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True)
    # A folder that a .pth file names is searched, but .pth files in it, such as the editable install's, are not read.
    with open(f"{site_packages(python)}/dependencies.pth", "w") as file:
        file.write(site_packages(sys.executable))
    return python
