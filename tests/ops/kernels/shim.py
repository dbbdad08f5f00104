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

from sere.ops.kernels import cuda

FOLDER = Path(__file__).parent / "cuda_on_cpu"
KERNELS = Path(cuda.__file__).parent
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_NUMBER, _NULL_POINTER, _BUFFER, _SAME_AS = range(4)
_POSITIONS = {"sere_reroute": 0, "sere_token_roles": 1}

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@functools.cache
def build(*flags: str) -> Path:
    """Compile the kernels and the program that serves launches of them."""
    program = Path(tempfile.mkdtemp(prefix="cuda-on-cpu-")) / "serve"
    command = ["g++", "-std=c++17", "-O1", "-g", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-pthread", *flags]
    sources = [KERNELS / "reroute.cu", KERNELS / "token_roles.cu", FOLDER / "serve.cpp", FOLDER / "cuda.cpp"]
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

    def launch(self, kernel: str, num_threads: int, arguments: tuple) -> None:
        """Run one block on copies of the tensors, and copy back what it wrote.

        Raises:
            AssertionError: with the sanitizer's report, if the program died.
        """
        header = (_POSITIONS[kernel], num_threads, next(self._seeds) % 2**31, len(arguments))
        request = [struct.pack("4i", *header)]
        tensors: list[torch.Tensor] = []
        positions: dict[int, int] = {}
        for position, value in enumerate(arguments):
            if value is None:
                request.append(struct.pack("2q", _NULL_POINTER, 0))
            elif isinstance(value, int):
                request.append(struct.pack("2q", _NUMBER, value))
            elif value.numel() and value.data_ptr() in positions:
                request.append(struct.pack("2q", _SAME_AS, positions[value.data_ptr()]))
            else:
                positions[value.data_ptr()] = position
                raw = value.numpy().tobytes()
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


@contextmanager
def cuda_on_cpu(*flags: str) -> Iterator[list[Shim]]:
    """Within, `sere.ops.kernels.cuda` runs its kernels on CPU tensors; yields the shims of 32-bit and 64-bit ids."""
    shims = {options: Shim(*flags, *options) for options in ((), ("-DTOPK_INT64",))}

    def compiled(source, kernel, options, device_index):
        return functools.partial(shims[options].launch, kernel)

    try:
        with mock.patch.object(cuda, "compiled", compiled):
            yield list(shims.values())
    finally:
        for shim in shims.values():
            shim.close()
