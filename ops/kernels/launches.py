"""Launches of `reroute.cu` and `token_roles.cu`.

A launch allocates nothing, waits for nothing, and reads nothing that changes from step to step on the host, so it can be
recorded in a CUDA graph; compile and launch once before that (`sere.ops.kernels.cuda.warm_up`).
"""

import torch
from torch import Tensor

import sere.ops.kernels.compile as kernels
from sere.ops.kernels.compile import require
from sere.ops.kernels.counting import COUNTERS
from sere.ops.kernels.neighbours import NEIGHBOURS_PER_SEARCH

# Bounds of reroute.cu and route.cu.
MAX_EXPERTS, MAX_TOP_K = 1024, 32
_MAX_THREADS, _WARP = 1024, 32
_LANES_PER_SEARCH, _BYTES_PER_LOAD = 8, 16


def reroute(
    topk_weights: Tensor,
    topk_ids: Tensor,
    neighbours: Tensor | None,
    *,
    num_experts: int,
    primary_top_k: int,
    new_ids: Tensor,
    roles: Tensor | None = None,
    step: Tensor | None = None,
    counters: Tensor | None = None,
) -> None:
    """Re-route one step of one layer, and count it: `reroute_reference` and `count_step` in one launch.

    Args:
        topk_weights: float32 `[num_tokens, top_k]`, contiguous.
        topk_ids: int32 or int64, same shape, contiguous.
        neighbours: int16 `[num_experts, n]` (`sorted_neighbours`), contiguous, aligned to 16 bytes. None: only count.
        num_experts: Experts of the layer, at most 1024.
        primary_top_k: Slots per decode row that vote, at least 1.
        new_ids: Where the result goes: shape and dtype of `topk_ids`, contiguous; may be `topk_ids` itself.
        roles: int8 `[num_tokens]`. None: all rows are decode rows.
        step: int64 `[3]` (`TokenRoles.step`). None: re-route whatever the roles say.
        counters: int64 `[len(COUNTERS)]`, added to. None: do not count. Needs `step`.

    Raises:
        ValueError: if a tensor is not what the kernel reads.
        ConfigError: if the kernel cannot be compiled.
    """
    num_tokens, top_k = topk_ids.shape
    if not (1 <= num_experts <= MAX_EXPERTS and 1 <= top_k <= MAX_TOP_K):
        raise ValueError(
            f"the CUDA kernel takes at most {MAX_EXPERTS} experts and top_k {MAX_TOP_K}, got {num_experts} and {top_k}"
        )
    expected = [
        ("topk_weights", topk_weights, (torch.float32,), (num_tokens, top_k)),
        ("topk_ids", topk_ids, (torch.int32, torch.int64), (num_tokens, top_k)),
        ("new_ids", new_ids, (topk_ids.dtype,), (num_tokens, top_k)),
        ("roles", roles, (torch.int8,), (num_tokens,)),
        ("step", step, (torch.int64,), (3,)),
        ("counters", counters, (torch.int64,), (len(COUNTERS),)),
        ("neighbours", neighbours, (torch.int16,), (None, None)),
    ]
    for name, tensor, dtypes, shape in expected:
        if tensor is not None:
            require(name, tensor, dtypes, shape, topk_ids.device)
    if primary_top_k < 1:
        raise ValueError(f"primary_top_k must be at least 1, got {primary_top_k}")
    if neighbours is None:
        primary_top_k = top_k
    elif neighbours.shape[0] != num_experts or neighbours.shape[1] % NEIGHBOURS_PER_SEARCH != 0:
        raise ValueError(f"neighbours must be those of {num_experts} experts, got {list(neighbours.shape)}")
    elif neighbours.data_ptr() % _BYTES_PER_LOAD != 0:
        raise ValueError(
            f"neighbours must begin at a multiple of {_BYTES_PER_LOAD} bytes, got {neighbours.data_ptr():#x}: clone() them"
        )
    if counters is not None and step is None:
        raise ValueError("counters need step, which says how many rows decode")
    if num_tokens == 0:
        return
    if num_tokens * top_k > torch.iinfo(torch.int32).max:
        raise ValueError(f"{num_tokens} rows are more than the CUDA kernel takes")

    lanes_per_row = 1 << (top_k - 1).bit_length()
    wanted = max(num_tokens * lanes_per_row, num_experts * _LANES_PER_SEARCH)
    num_threads = min(_MAX_THREADS, -(-wanted // _WARP) * _WARP)
    options = ("-DTOPK_INT64",) if topk_ids.dtype == torch.int64 else ()
    kernel = kernels.compiled("reroute.cu", "sere_reroute", options, topk_ids.device.index or 0)
    width = 0 if neighbours is None else neighbours.shape[1]
    tensors = (topk_weights, topk_ids, new_ids, roles, step, neighbours, counters)
    kernel(num_threads, (*tensors, num_tokens, top_k, num_experts, primary_top_k, width))


def fill_roles(
    query_start_loc: Tensor, roles: Tensor, step: Tensor, *, decode_length: int, min_tokens: int, max_tokens: int
) -> None:
    """Set the roles of a step: `TokenRoles.fill` in one launch.

    Args:
        query_start_loc: int32 `[num_sequences + 1]`, contiguous, of at least one sequence.
        roles: int8 `[capacity]`, contiguous, written.
        step: int64 `[3]`, contiguous, written: decode rows, rows that are not padding, 1 if any row's role is DECODE.
        decode_length: Most rows of a sequence that is decoding.
        min_tokens: Fewer decode rows than this: no row's role is DECODE.
        max_tokens: More rows than this: no row's role is DECODE.

    Raises:
        ValueError: if a tensor is not what the kernel reads or writes.
        ConfigError: if the kernel cannot be compiled.
    """
    for name, tensor, dtype, size in (
        ("query_start_loc", query_start_loc, torch.int32, None),
        ("roles", roles, torch.int8, None),
        ("step", step, torch.int64, 3),
    ):
        require(name, tensor, (dtype,), (size,), roles.device)
    if query_start_loc.numel() < 2:
        raise ValueError(f"query_start_loc must have at least 2 values (one sequence), got {query_start_loc.numel()}")
    capacity, num_sequences = roles.numel(), query_start_loc.numel() - 1
    # More than the capacity is as good as the capacity plus one, and fits the kernel's 32 bits.
    min_tokens, max_tokens = min(min_tokens, capacity + 1), min(max_tokens, capacity + 1)
    num_threads = min(_MAX_THREADS, -(-max(capacity, num_sequences) // _WARP) * _WARP)
    kernel = kernels.compiled("token_roles.cu", "sere_token_roles", (), roles.device.index or 0)
    kernel(num_threads, (query_start_loc, roles, step, num_sequences, capacity, decode_length, min_tokens, max_tokens))
