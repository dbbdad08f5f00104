"""NVRTC through ctypes: compiles CUDA C++ as CuPy does, with no GPU and no driver."""

import ctypes
import ctypes.util
import functools
import importlib.util
from pathlib import Path


@functools.cache
def library() -> ctypes.CDLL | None:
    """NVRTC of a pip package or of the system; None if there is none."""
    candidates = []
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else []:
        candidates += sorted(Path(folder).glob("*/lib/libnvrtc.so.*"), reverse=True)
    for name in [*map(str, candidates), ctypes.util.find_library("nvrtc")]:
        if name and "builtins" not in name:
            try:
                return ctypes.CDLL(name)
            except OSError:
                continue
    return None


def version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"NVRTC {major.value}.{minor.value}"


def compile_to_cubin(name: str, text: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    """The machine code and the log, which holds warnings and, with `--ptxas-options=-v`, the use of resources.

    Raises:
        AssertionError: with the log, if it does not compile.
    """
    nvrtc = library()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None) == 0
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    assert nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0
    cubin = ctypes.create_string_buffer(size.value)
    assert nvrtc.nvrtcGetCUBIN(program, cubin) == 0
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw, log.value.decode()
