"""The custom op `sere::reroute_topk`: re-routing of one step of one layer, dispatched by device.

Same contract as `sere.ops.reference.reroute_reference`, for use in compiled graphs: it has a fake kernel and no Python state.
"""

import torch
from torch import Tensor

from sere.ops.kernels import cpu, cuda
from sere.ops.kernels.neighbours import neighbours_of

_library = torch.library.Library("sere", "FRAGMENT")
_library.define(
    "reroute_topk(Tensor topk_weights, Tensor topk_ids, Tensor similarity, int primary_top_k, float threshold, "
    "Tensor? roles) -> Tensor"
)


def reroute_topk(
    topk_weights: Tensor,
    topk_ids: Tensor,
    similarity: Tensor,
    *,
    primary_top_k: int,
    threshold: float,
    roles: Tensor | None = None,
) -> Tensor:
    """Re-route the secondary experts of one step: `reroute_reference`, fast. Arguments and result are the reference's.

    Raises:
        ValueError: if shapes, dtypes or `primary_top_k` do not fit together, or (GPU) `similarity` was made in inference mode.
        NotImplementedError: if there is no kernel for the tensors' device.
    """
    if topk_ids.ndim != 2 or topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights and topk_ids must both be [num_tokens, top_k], got {list(topk_weights.shape)} and "
            f"{list(topk_ids.shape)}"
        )
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1] or similarity.dtype != torch.float32:
        raise ValueError(
            f"similarity must be float32 [num_experts, num_experts], got {similarity.dtype} {list(similarity.shape)}"
        )
    if roles is not None and (roles.dtype != torch.int8 or roles.shape != topk_ids.shape[:1]):
        raise ValueError(f"roles must be int8 [{topk_ids.shape[0]}], got {roles.dtype} {list(roles.shape)}")
    if primary_top_k < 1:
        raise ValueError(f"primary_top_k must be at least 1, got {primary_top_k}")
    return torch.ops.sere.reroute_topk(topk_weights, topk_ids, similarity, primary_top_k, threshold, roles)


@torch.library.impl(_library, "reroute_topk", "CPU")
def _reroute_topk_cpu(
    topk_weights: Tensor,
    topk_ids: Tensor,
    similarity: Tensor,
    primary_top_k: int,
    threshold: float,
    roles: Tensor | None,
) -> Tensor:
    return cpu.reroute(topk_weights, topk_ids, similarity, primary_top_k=primary_top_k, threshold=threshold, roles=roles)


@torch.library.impl(_library, "reroute_topk", "CUDA")
def _reroute_topk_cuda(
    topk_weights: Tensor,
    topk_ids: Tensor,
    similarity: Tensor,
    primary_top_k: int,
    threshold: float,
    roles: Tensor | None,
) -> Tensor:
    topk_ids = topk_ids.contiguous()
    new_ids = torch.empty_like(topk_ids)
    cuda.reroute(
        topk_weights.float().contiguous() if topk_weights.dtype != torch.float64 else topk_weights,
        topk_ids,
        neighbours_of(similarity, threshold),
        num_experts=similarity.shape[0],
        primary_top_k=primary_top_k,
        new_ids=new_ids,
        roles=None if roles is None else roles.contiguous(),
    )
    return new_ids


@torch.library.register_fake("sere::reroute_topk", lib=_library)
def _reroute_topk_fake(
    topk_weights: Tensor,
    topk_ids: Tensor,
    similarity: Tensor,
    primary_top_k: int,
    threshold: float,
    roles: Tensor | None,
) -> Tensor:
    return torch.empty_like(topk_ids)
