"""Launches of `compensate.cu`: what is added to a layer's output for the experts that were taken away."""

import torch
from torch import Tensor

import sere.ops.kernels.compile as kernels
from sere.ops.kernels.compile import require
from sere.ops.kernels.launches import MAX_EXPERTS

# As compensate.cu has them.
_THREADS, _ROWS, _COLUMNS, _BYTES_PER_LOAD = 256, 8, 64, 16
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def takes(means: Tensor) -> bool:
    """Whether the kernels can compensate a layer with these means, `[num_experts, hidden_size]`: its type and sizes fit."""
    num_experts, hidden_size = means.shape
    return means.dtype in _NAMES and num_experts <= MAX_EXPERTS and hidden_size * means.element_size() % _BYTES_PER_LOAD == 0


def compile_for(dtype: torch.dtype, device: torch.device) -> None:
    """Compile the kernels for activations of this type: not in the middle of a graph's capture.

    Raises:
        ConfigError: if they cannot be compiled.
    """
    for name in ("project", "compensate"):
        kernels.compiled("compensate.cu", f"sere_{name}_{_NAMES[dtype]}", (), device.index or 0)


def compensate(
    output: Tensor,
    hidden_states: Tensor,
    difference: Tensor,
    means: Tensor,
    inputs: Tensor | None,
    outputs: Tensor | None,
    *,
    share: float,
) -> Tensor:
    """`Compensator.add` in one launch, or two where there are surrogates. Reads those of experts whose weight changed only.

    Args:
        output: Of the routed experts, float32, bfloat16 or float16 `[num_tokens, hidden_size]`, contiguous.
        hidden_states: Their input, same type and shape, contiguous.
        difference: float32 `[>= num_tokens, num_experts]`, contiguous: what each expert's weight has lost.
        means: `[num_experts, hidden_size]` of the same type: the intercepts.
        inputs: `[num_experts * rank, hidden_size]` of the same type. None: rank 0.
        outputs: Likewise.
        share: What the sum is multiplied by.

    Returns:
        A new tensor like `output`.

    Raises:
        ValueError: if a tensor is not what the kernels read.
        ConfigError: if the kernels cannot be compiled.
    """
    (num_tokens, hidden_size), num_experts = output.shape, len(means)
    rank = 0 if inputs is None else len(inputs) // num_experts
    for name, tensor, dtype, shape in (
        ("output", output, output.dtype, (num_tokens, hidden_size)),
        ("hidden_states", hidden_states, output.dtype, (num_tokens, hidden_size)),
        ("difference", difference, torch.float32, (None, num_experts)),
        ("means", means, output.dtype, (num_experts, hidden_size)),
        ("inputs", inputs, output.dtype, (num_experts * rank, hidden_size)),
        ("outputs", outputs, output.dtype, (num_experts * rank, hidden_size)),
    ):
        if tensor is not None:
            require(name, tensor, (dtype,), shape, output.device)
            if tensor.data_ptr() % _BYTES_PER_LOAD:
                raise ValueError(f"{name} must begin at a multiple of {_BYTES_PER_LOAD} bytes, got {tensor.data_ptr():#x}")
    if not takes(means):
        raise ValueError(f"the CUDA kernel takes at most {MAX_EXPERTS} experts and rows of whole 16 bytes, got {means.shape}")
    if len(difference) < num_tokens:
        raise ValueError(f"difference has {len(difference)} rows, the step {num_tokens}")
    result = torch.empty_like(output)
    if num_tokens == 0:
        return result
    name, index = _NAMES[output.dtype], output.device.index or 0
    sizes = (num_tokens, num_experts, rank, hidden_size)
    projections = None
    if rank:
        projections = torch.empty(num_tokens, num_experts * rank, dtype=torch.float32, device=output.device)
        project = kernels.compiled("compensate.cu", f"sere_project_{name}", (), index)
        project(_THREADS, (hidden_states, inputs, difference, projections, *sizes), (num_experts, 1))
    launch = kernels.compiled("compensate.cu", f"sere_compensate_{name}", (), index)
    grid = (-(-hidden_size // _COLUMNS), -(-num_tokens // _ROWS))
    launch(_THREADS, (output, means, outputs, difference, projections, result, float(share), *sizes), grid)
    return result
