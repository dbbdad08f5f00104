"""Compiles the CUDA sources of `cuda_sources` with CuPy (NVRTC), for launches on torch's current stream.

Needs torch and CuPy only.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sere.conf.errors import ConfigError

COMPILE_OPTIONS = ("--std=c++17",)
_MIN_COMPUTE_CAPABILITY = (8, 0)
SOURCES = Path(__file__).parent / "cuda_sources"
_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)


def install_line() -> str:
    """What to run where CuPy or NVRTC is missing."""
    major = (torch.version.cuda or "13").split(".")[0]
    return f"pip install 'cupy-cuda{major}x[ctk]>=13.6,<15'"


def source_text(path: Path) -> str:
    """A source with what it includes in the includes' place: CuPy keeps compiled kernels by their text, which must be whole."""
    return _INCLUDE.sub(lambda found: source_text(path.parent / found[1]), path.read_text())


@functools.cache
def compiled(source: str, kernel: str, options: tuple[str, ...], device_index: int) -> Callable[..., None]:
    """Compile one kernel for one device.

    Returns:
        A function of the number of threads, the kernel's arguments (tensors, None for a null pointer, integers of 32 bits,
        floats of 64) and, if it has more than one thread block, their number in each of two dimensions; it launches on torch's
        current stream.

    Raises:
        ConfigError: if CuPy or NVRTC is missing, or the device is too old.
    """
    capability = torch.cuda.get_device_capability(device_index)
    if torch.version.hip is not None or capability < _MIN_COMPUTE_CAPABILITY:
        name = torch.cuda.get_device_name(device_index)
        raise ConfigError(
            f"re-routing needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer, {name} has "
            f"{'.'.join(map(str, capability))}: use another GPU, or remove `sere` from additional_config"
        )
    try:
        import cupy
        import numpy
    except ImportError as error:
        raise ConfigError(f"re-routing on a GPU needs CuPy, which cannot be imported ({error}): {install_line()}") from error

    code = source_text(SOURCES / source)
    try:
        with cupy.cuda.Device(device_index):
            function = cupy.RawModule(code=code, options=(*COMPILE_OPTIONS, *options)).get_function(kernel)
            # Compiles, or takes what an earlier process compiled from CuPy's cache.
            function.compile()
    except Exception as error:
        # CuPy loads NVRTC when it first compiles; its CompileException is a plain Exception.
        raise ConfigError(
            f"{source} could not be compiled ({type(error).__name__}: {error}). If NVRTC is missing or does not fit: "
            f"{install_line()}"
        ) from error

    def as_argument(value: Any) -> Any:
        if isinstance(value, int):
            return numpy.int32(value)
        if isinstance(value, float):
            return numpy.float64(value)
        return 0 if value is None else value.data_ptr()

    def launch(num_threads: int, arguments: tuple, grid: tuple[int, int] = (1, 1)) -> None:
        with cupy.cuda.Device(device_index), cupy_stream(cupy, device_index):
            function(grid, (num_threads,), tuple(as_argument(value) for value in arguments))

    return launch


def require(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...], device: torch.device
) -> None:
    """Refuse a tensor that a kernel would misread. A size of None is any size."""
    same_shape = tensor.ndim == len(shape) and all(b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))
    if not (same_shape and tensor.dtype in dtypes and tensor.device == device and tensor.is_contiguous()):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{name} must be contiguous {' or '.join(str(dtype) for dtype in dtypes)} [{sizes}] on {device}, got "
            f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        )


class _TorchStream:
    """Torch's current stream, as CuPy 14 takes it (the CUDA stream protocol)."""

    def __init__(self, device_index: int) -> None:
        self._stream = torch.cuda.current_stream(device_index)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream.cuda_stream


def cupy_stream(cupy: Any, device_index: int) -> Any:
    """Torch's current stream as a context manager of CuPy's, whichever CuPy that is."""
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_TorchStream(device_index))
    return cupy.cuda.ExternalStream(torch.cuda.current_stream(device_index).cuda_stream, device_index)
