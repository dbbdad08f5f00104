"""The custom op `sere::reroute_topk`: re-routing of one step of one layer, dispatched by device.

Same contract as `sere.ops.reference.reroute_reference`, for use in compiled graphs: it has a fake kernel and no Python state.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sere.ops.reference import DECODE, PREFILL

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


def voting_slots(topk_weights: Tensor, topk_ids: Tensor, primary_top_k: int, roles: Tensor | None) -> Tensor:
    """The slots that make their expert primary, bool `[num_tokens, top_k]` (step 1 of the reference)."""
    used = topk_ids >= 0
    order = topk_weights.masked_fill(~used, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    votes = torch.zeros_like(used).scatter_(1, order[:, :primary_top_k], True).logical_and_(used)
    if roles is None:
        return votes
    role = roles.unsqueeze(1)
    return votes.logical_and_(role == DECODE).logical_or_(used.logical_and_(role == PREFILL))


def primary_experts(topk_ids: Tensor, votes: Tensor, num_experts: int) -> Tensor:
    """Which experts are primary, bool `[num_experts]`. Has no data-dependent shapes."""
    # Slots without a vote write to one expert past the last.
    target = torch.where(votes, topk_ids.long(), num_experts).flatten()
    primary = torch.zeros(num_experts + 1, dtype=torch.bool, device=topk_ids.device)
    return primary.index_fill_(0, target, True)[:num_experts]


@torch.library.impl(_library, "reroute_topk", "CPU")
def _reroute_topk_cpu(
    topk_weights: Tensor,
    topk_ids: Tensor,
    similarity: Tensor,
    primary_top_k: int,
    threshold: float,
    roles: Tensor | None,
) -> Tensor:
    if topk_ids.numel() == 0 or primary_top_k >= topk_ids.shape[1]:
        return topk_ids.clone()
    num_experts = similarity.shape[0]
    votes = voting_slots(topk_weights, topk_ids, primary_top_k, roles)
    primary = primary_experts(topk_ids, votes, num_experts)
    # Only the primary experts' columns are searched; they ascend, and argmax takes the first, lowest, of equals.
    candidates = primary.nonzero().squeeze(1)
    if candidates.numel() in (0, num_experts):
        return topk_ids.clone()
    best, column = similarity.index_select(1, candidates).max(dim=1)
    reroutes = (best >= threshold).logical_and_(~primary)
    table = torch.where(reroutes, candidates[column], torch.arange(num_experts)).to(topk_ids.dtype)
    rerouted = table[topk_ids.clamp(min=0).flatten().long()].view_as(topk_ids)
    # A slot that voted has a primary expert, which the table maps to itself.
    changeable = topk_ids >= 0
    if roles is not None:
        changeable.logical_and_((roles == DECODE).unsqueeze(1))
    return torch.where(changeable, rerouted, topk_ids)


_neighbours = WeakTensorKeyDictionary()
"""Per similarity matrix: its contents' version, and what `sere.ops.kernels.cuda.sorted_neighbours` made of it, by threshold."""


def _neighbours_of(similarity: Tensor, threshold: float) -> Tensor:
    from sere.ops.kernels.cuda import sorted_neighbours

    if similarity.is_inference():
        # Such tensors have no version: neighbours sorted before a change in place would go on being used after it.
        raise ValueError("similarity was made in inference mode, where changes of it cannot be seen: make it outside of it")
    version = similarity._version
    known_version, by_threshold = _neighbours.get(similarity, (version, {}))
    if known_version != version:
        by_threshold = {}
    if threshold not in by_threshold:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "re-route once with this similarity matrix and threshold before capturing a CUDA graph: its neighbours are "
                "sorted at the first call"
            )
        by_threshold[threshold] = sorted_neighbours(similarity, threshold)
        _neighbours[similarity] = version, by_threshold
    return by_threshold[threshold]


@torch.library.impl(_library, "reroute_topk", "CUDA")
def _reroute_topk_cuda(
    topk_weights: Tensor,
    topk_ids: Tensor,
    similarity: Tensor,
    primary_top_k: int,
    threshold: float,
    roles: Tensor | None,
) -> Tensor:
    from sere.ops.kernels.cuda import reroute

    topk_ids = topk_ids.contiguous()
    new_ids = torch.empty_like(topk_ids)
    reroute(
        topk_weights.float().contiguous() if topk_weights.dtype != torch.float64 else topk_weights,
        topk_ids,
        _neighbours_of(similarity, threshold),
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
