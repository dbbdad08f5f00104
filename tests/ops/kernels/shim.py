"""The CUDA kernels without a GPU: compiled by g++ (see cuda_on_cpu/), run on CPU tensors under sanitizers."""

import functools
import itertools
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

import sere.ops.kernels.compile as kernels

FOLDER = Path(__file__).parent / "cuda_on_cpu"
KERNELS = kernels.SOURCES
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_NUMBER, _NULL_POINTER, _BUFFER, _SAME_AS, _REAL = range(5)
_TYPES = ("float32", "bfloat16", "float16")
_KERNELS = ("sere_reroute", "sere_token_roles", "sere_route")
_KERNELS += tuple(f"sere_{name}_{dtype}" for name in ("project", "compensate") for dtype in _TYPES)
_DEFAULT = "-DEXPERTS_PER_LANE=4"

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@functools.cache
def build(*flags: str) -> Path:
    """Compile the kernels and the program that serves launches of them."""
    program = Path(tempfile.mkdtemp(prefix="cuda-on-cpu-")) / "serve"
    command = ["g++", "-std=c++17", "-O1", "-g", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-pthread", *flags]
    sources = [*sorted(KERNELS.glob("*.cu")), FOLDER / "serve.cpp", FOLDER / "cuda.cpp"]
    command += ["-I", FOLDER, "-include", "cuda.h", "-x", "c++", *sources, "-o", program]
    subprocess.run([str(part) for part in command], check=True)
    return program


class Shim:
    """Launches of one build. Speaks the protocol of serve.cpp."""

    def __init__(self, *flags: str) -> None:
        # vLLM preloads libraries into its children, before which the sanitizers' own would have to come.
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._process = subprocess.Popen([build(*flags)], env=environment, **pipes)
        self._seeds = itertools.count()
        self.num_launches = 0

    def launch(self, kernel: str, num_threads: int, arguments: tuple, grid: tuple[int, int] = (1, 1)) -> None:
        """Run a kernel on copies of the tensors, and copy back what it wrote.

        Raises:
            AssertionError: with the sanitizer's report, if the program died.
        """
        header = (_KERNELS.index(kernel), num_threads, next(self._seeds) % 2**30, *grid, len(arguments))
        request = [struct.pack("6i", *header)]
        tensors: list[torch.Tensor] = []
        positions: dict[int, int] = {}
        for position, value in enumerate(arguments):
            if value is None:
                request.append(struct.pack("2q", _NULL_POINTER, 0))
            elif isinstance(value, int):
                request.append(struct.pack("2q", _NUMBER, value))
            elif isinstance(value, float):
                request.append(struct.pack("qd", _REAL, value))
            elif value.numel() and value.data_ptr() in positions:
                request.append(struct.pack("2q", _SAME_AS, positions[value.data_ptr()]))
            else:
                positions[value.data_ptr()] = position
                raw = _bytes_of(value)
                request += [struct.pack("2q", _BUFFER, len(raw)), raw]
                tensors.append(value)
        try:
            self._process.stdin.write(b"".join(request))
            self._process.stdin.flush()
            for tensor in tensors:
                size = tensor.numel() * tensor.element_size()
                raw = self._process.stdout.read(size)
                assert len(raw) == size
                if size:
                    tensor.copy_(torch.frombuffer(bytearray(raw), dtype=tensor.dtype).view(tensor.shape))
        except (AssertionError, BrokenPipeError):
            raise AssertionError(self.close()) from None
        self.num_launches += 1

    def close(self) -> str:
        """End the program; what it wrote to standard error (the thread sanitizer reports there and goes on)."""
        return self._process.communicate()[1].decode()


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


class Shims(dict[tuple[str, ...], Shim]):
    """A shim for each set of compile options, built when it is first asked for."""

    def __init__(self, *flags: str) -> None:
        super().__init__()
        self._flags = flags

    def __missing__(self, options: tuple[str, ...]) -> Shim:
        self[options] = shim = Shim(*self._flags, *options)
        return shim

    @property
    def num_launches(self) -> int:
        return sum(shim.num_launches for shim in self.values())


@contextmanager
def cuda_on_cpu(*flags: str) -> Iterator[Shims]:
    """Within, kernels that are compiled for a GPU run on CPU tensors."""
    shims = Shims(*flags)

    def compiled(source, kernel, options, device_index):
        # One program holds all kernels: those without options of their own take what others have built.
        options = options if any("EXPERTS" in option for option in options) else (_DEFAULT, *options)
        return lambda *arguments: shims[options].launch(kernel, *arguments)

    try:
        with mock.patch.object(kernels, "compiled", compiled):
            yield shims
    finally:
        for shim in shims.values():
            shim.close()
