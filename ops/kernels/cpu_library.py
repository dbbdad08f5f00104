"""The compiled library of the CPU path: made by g++ from `cpu_sources` when it is first needed, found on disk after that.

A plain C interface, so that neither Python's nor torch's headers are needed and compiling takes about two seconds. It lies
beside this file, as Python's own compiled files do, or in the user's cache where that cannot be written.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from sere.ops.kernels.cpu_plan import SIZES

logger = logging.getLogger("vllm.sere")

SOURCES = Path(__file__).parent / "cpu_sources"
# Not -ffast-math: sums and roundings are those of the reference. -O3 takes 1.4 seconds longer and gains nothing.
FLAGS = (
    "-std=c++20",
    "-O2",
    "-ftree-vectorize",
    "-fvect-cost-model=dynamic",
    "-ffp-contract=off",
    "-fno-math-errno",
)
_COMPILERS = ("g++", "c++", "clang++")
_lock = threading.Lock()


def library() -> ctypes.PyDLL | None:
    """The library, compiled if it has to be; None, with one line in the log, where that cannot be done."""
    with _lock:
        return _library()


@functools.cache
def _library() -> ctypes.PyDLL | None:
    name, tried = f"step-{_digest()}.so", []
    # Nobody else can write to the last one, and the library stays loaded when its file is gone.
    with tempfile.TemporaryDirectory(prefix="sere-") as own:
        for folder in (*_folders(), Path(own)):
            try:
                return _load_or_compile(folder / name)
            except FileNotFoundError as error:
                tried = [str(error)]
                break
            except (OSError, subprocess.SubprocessError) as error:
                output = (getattr(error, "stderr", None) or str(error)).strip()
                tried.append(f"{folder}: {output.splitlines()[-1] if output else type(error).__name__}")
    logger.warning(
        "SERE re-routes with torch's operations, 5 to 20 times slower than compiled code (%s): install g++ 11 or newer",
        "; ".join(tried),
    )
    return None


def _load_or_compile(path: Path) -> ctypes.PyDLL:
    if path.is_file():
        try:
            return load(path)
        except OSError:
            # Cut short, perhaps, by a full disk.
            logger.debug("%s is damaged and is compiled anew", path)
    compile_library(path)
    return load(path)


def compile_library(path: Path, *more: str) -> None:
    """Compile the sources to a shared library, whole or not at all.

    Args:
        path: Where it goes; its folder is made.
        more: Further flags.

    Raises:
        FileNotFoundError: if there is no compiler.
        OSError: if the file cannot be written.
        subprocess.SubprocessError: if the compiler fails; its `stderr` says why.
    """
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler is installed")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        command = [compiler, *FLAGS, "-shared", "-fPIC", "-march=native", *more, str(SOURCES / "step.cpp"), "-o", part]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        Path(part).chmod(0o644)
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def load(path: Path) -> ctypes.PyDLL:
    """Load a library.

    Raises:
        OSError: if it is none, or is not of these sources.
    """
    # A PyDLL keeps the interpreter's lock: steps take microseconds, and to get the lock back can take milliseconds.
    found = ctypes.PyDLL(str(path))
    found.sere_sizes.restype = found.sere_step.restype = ctypes.c_int64
    found.sere_step.argtypes = [ctypes.c_char_p]
    if found.sere_sizes() != SIZES:
        raise OSError(f"{path} was made from other sources: remove it")
    return found


def _digest() -> str:
    """Names what the library depends on: sources, flags, and the processor, as machines of several kinds may share a home."""
    digest = hashlib.sha256(repr((FLAGS, platform.machine())).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    digest.update(repr(sorted({line for line in lines if line.lower().startswith(("model", "flags", "features"))})).encode())
    return digest.hexdigest()[:16]


def _folders() -> Iterator[Path]:
    yield Path(__file__).parent / "__pycache__"
    try:
        yield Path.home() / ".cache" / "sere"
    except RuntimeError:
        return
