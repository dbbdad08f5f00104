"""Similarity-based expert re-routing in plain Python: the contract every other implementation is compared with, exactly.

SERE, arXiv 2602.07616, section 3. Written to be read, not to be fast.
"""

import torch
from torch import Tensor

PADDING, PREFILL, DECODE = 0, 1, 2


def reroute_reference(
    topk_weights: Tensor,
    topk_ids: Tensor,
    similarity: Tensor,
    *,
    primary_top_k: int,
    threshold: float,
    roles: Tensor | None = None,
) -> Tensor:
    """Re-route the secondary experts of one decode step of one layer.

    1. Every decode row votes for the experts of its `primary_top_k` highest-weighted slots (equal weights: the lowest slot
       ranks first), every prefill row for all its experts, padding rows for none. The experts voted for are *primary*.
    2. Every other slot of a decode row whose expert is not primary goes to the primary expert most similar to it (equal
       similarities: the lowest expert id), if that similarity is at least `threshold`.
    3. Otherwise the slot keeps its expert, which is then *critical*. Prefill and padding rows never change.

    A negative id marks an unused slot: it has no rank and no vote, and passes through. Weights are not changed.

    Args:
        topk_weights: Routing weights, float `[num_tokens, top_k]`, finite, in any order within a row.
        topk_ids: Expert ids, int32 or int64 `[num_tokens, top_k]`, below num_experts.
        similarity: float32 `[num_experts, num_experts]`; row: the expert replaced, column: its replacement.
        primary_top_k: Slots per decode row that vote (the paper's S), at least 1.
        threshold: Least similarity that re-routes (the paper's rho), compared as float32.
        roles: int8 `[num_tokens]`: 0 padding, 1 prefill, 2 decode. None: all decode.

    Returns:
        New ids, of the shape and dtype of `topk_ids`.
    """
    weights, ids = topk_weights.tolist(), topk_ids.tolist()
    row_roles = [DECODE] * len(ids) if roles is None else roles.tolist()
    least = torch.tensor(threshold, dtype=torch.float32)

    def ranked_slots(row: int) -> list[int]:
        used = [slot for slot, expert in enumerate(ids[row]) if expert >= 0]
        return sorted(used, key=lambda slot: (-weights[row][slot], slot))

    primary: set[int] = set()
    for row, role in enumerate(row_roles):
        if role != PADDING:
            voting = ranked_slots(row) if role == PREFILL else ranked_slots(row)[:primary_top_k]
            primary.update(ids[row][slot] for slot in voting)

    candidates = sorted(primary)
    replacement: dict[int, int] = {}
    for row, role in enumerate(row_roles):
        if role != DECODE:
            continue
        for slot in ranked_slots(row)[primary_top_k:]:
            expert = ids[row][slot]
            if expert in primary:
                continue
            if expert not in replacement:
                # argmax returns the first maximum: the lowest expert id, since candidates ascend.
                most_similar = candidates[int(similarity[expert, candidates].argmax())]
                replacement[expert] = most_similar if similarity[expert, most_similar] >= least else expert
            ids[row][slot] = replacement[expert]
    return torch.tensor(ids, dtype=topk_ids.dtype, device=topk_ids.device).reshape(topk_ids.shape)
