"""Launches of the CUDA kernels of `ops/kernels`, and the comparison of their results at engine start.

A launch allocates nothing, waits for nothing, and reads nothing that changes from step to step on the host, so it can be
recorded in a CUDA graph; compile and launch once before that (`warm_up`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sere.conf.errors import ConfigError
from sere.conf.schema.rules import Rules
from sere.ops.kernels.compile import compiled
from sere.ops.kernels.counting import COUNTERS
from sere.ops.kernels.neighbours import NEIGHBOURS_PER_SEARCH, neighbours_of, sorted_neighbours
from sere.ops.reference import DECODE, PADDING, PREFILL, reroute_reference

# Bounds of reroute.cu.
MAX_EXPERTS, MAX_TOP_K = 1024, 32
_MAX_THREADS, _WARP = 1024, 32
_LANES_PER_SEARCH, _BYTES_PER_LOAD = 8, 16


def _require(
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
            _require(name, tensor, dtypes, shape, topk_ids.device)
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
    kernel = compiled("reroute.cu", "sere_reroute", options, topk_ids.device.index or 0)
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
        _require(name, tensor, (dtype,), (size,), roles.device)
    if query_start_loc.numel() < 2:
        raise ValueError(f"query_start_loc must have at least 2 values (one sequence), got {query_start_loc.numel()}")
    capacity, num_sequences = roles.numel(), query_start_loc.numel() - 1
    # More than the capacity is as good as the capacity plus one, and fits the kernel's 32 bits.
    min_tokens, max_tokens = min(min_tokens, capacity + 1), min(max_tokens, capacity + 1)
    num_threads = min(_MAX_THREADS, -(-max(capacity, num_sequences) // _WARP) * _WARP)
    kernel = compiled("token_roles.cu", "sere_token_roles", (), roles.device.index or 0)
    kernel(num_threads, (query_start_loc, roles, step, num_sequences, capacity, decode_length, min_tokens, max_tokens))


def warm_up(device: torch.device) -> None:
    """Compile every kernel for `device`, launch each once and compare with the reference. Before any graph capture.

    Raises:
        ConfigError: if a kernel cannot be compiled.
        RuntimeError: if a kernel is wrong on this device.
    """
    # vLLM loads models under another default device, and another default type (named below).
    with torch.device("cpu"):
        right = _agrees_with_reference(device)
    if not right:
        raise RuntimeError(
            f"the re-routing kernels give wrong results on {torch.cuda.get_device_name(device)}: run tests/gpu and report this"
        )


def _agrees_with_reference(device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    num_tokens, num_experts, top_k = 24, 60, 6
    similarity = torch.rand(num_experts, num_experts, generator=generator, dtype=torch.float32)
    scores = torch.rand(num_tokens, num_experts, generator=generator, dtype=torch.float32)
    weights, ids = scores.topk(top_k)
    starts = torch.tensor([0, 5, *range(6, 22)], dtype=torch.int32)
    expected_roles = torch.tensor([PREFILL] * 5 + [DECODE] * 16 + [PADDING] * 3, dtype=torch.int8)
    roles = torch.zeros(num_tokens, dtype=torch.int8, device=device)
    step = torch.zeros(3, dtype=torch.int64, device=device)
    fill_roles(starts.to(device), roles, step, decode_length=1, min_tokens=1, max_tokens=1024)
    neighbours = sorted_neighbours(similarity, 0.5).to(device)
    right = torch.equal(roles.cpu(), expected_roles)
    for dtype in (torch.int32, torch.int64):
        new_ids = ids.to(device, dtype)
        reroute(
            weights.to(device),
            new_ids,
            neighbours,
            num_experts=num_experts,
            primary_top_k=2,
            new_ids=new_ids,
            roles=roles,
            step=step,
        )
        expected = reroute_reference(weights, ids, similarity, primary_top_k=2, threshold=0.5, roles=expected_roles)
        right &= torch.equal(new_ids.cpu().long(), expected)
    return right


class LaunchedStep:
    """A policy's whole step in one launch of `reroute.cu`, counters included."""

    def __init__(self, num_experts: int, primary_top_k: int, neighbours: Tensor | None) -> None:
        self.num_experts, self.primary_top_k, self.neighbours = num_experts, primary_top_k, neighbours

    def __call__(
        self,
        topk_weights: Tensor,
        topk_ids: Tensor,
        router_logits: Tensor,
        roles: Tensor,
        *,
        step: Tensor | None,
        counters: Tensor | None,
        difference: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if topk_ids.dtype == torch.uint32:
            topk_ids = topk_ids.view(torch.int32)
        ids = topk_ids.contiguous()
        reroute(
            topk_weights.float().contiguous(),
            ids,
            self.neighbours,
            num_experts=self.num_experts,
            primary_top_k=self.primary_top_k,
            new_ids=ids,
            roles=roles,
            step=step,
            counters=counters,
        )
        return topk_weights, ids


def launched_step(rules: Rules, layer: Any, similarity: Tensor | None, tables: Mapping[str, Tensor]) -> LaunchedStep | None:
    """The kernel for a policy; None for those that torch's operations do."""
    if layer.num_experts > MAX_EXPERTS or layer.top_k > MAX_TOP_K:
        raise ConfigError(
            f"layer {layer.index} has {layer.num_experts} experts and top_k {layer.top_k}, the CUDA kernel takes at most "
            f"{MAX_EXPERTS} and {MAX_TOP_K}: remove `sere` from additional_config"
        )
    votes = rules.votes
    if votes.rule == "all":
        return LaunchedStep(layer.num_experts, layer.top_k, None)
    whole = votes.rule == "top" and not votes.by_batch and votes.order == "weight" and votes.primary_top_k % 1 == 0
    if not whole or votes.protect or similarity is None or rules.weights != "keep" or rules.compensation.rule != "none":
        return None
    least = rules.targets.threshold if rules.targets.rule == "similar" else 0.0
    neighbours = neighbours_of(similarity, least) if votes.primary_top_k < layer.top_k else None
    return LaunchedStep(layer.num_experts, int(votes.primary_top_k), neighbours)
