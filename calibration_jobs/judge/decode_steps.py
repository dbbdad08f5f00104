"""Many decode steps of one layer at once: which tokens share a step, how a step is re-routed, how many experts it needs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sere.ops.kernels.votes import voting_slots

# Elements of the masked similarities held at once (256 MiB of float32).
_BLOCK_ELEMENTS = 1 << 26


def decode_groups(valid: Tensor, batch_size: int) -> Tensor:
    """Tokens that a decode step of `batch_size` sequences would hold: the same position of as many different sequences.

    Args:
        valid: bool `[num_sequences, sequence_length]`.
        batch_size: Sequences per step. Sequences that do not fill a step, and positions that not all of a step's sequences
            have, are left out.

    Returns:
        Indices into the flattened tokens, int64 `[num_groups, batch_size]`.
    """
    num_sequences, length = valid.shape
    kept = num_sequences // batch_size * batch_size
    index = torch.arange(num_sequences * length).view(num_sequences, length)[:kept].view(-1, batch_size, length)
    groups = index.transpose(1, 2).reshape(-1, batch_size)
    return groups[valid.flatten()[groups].all(dim=1)]


def static_steps(lengths: Sequence[int], batch_size: int, width: int) -> Tensor:
    """Decode steps of batches that run out: the n-th token of each of `batch_size` neighbouring rows, while they have one.

    Args:
        lengths: Decoded tokens of each row.
        batch_size: Rows of a batch.
        width: Row length of the flattened tokens.

    Returns:
        Indices into the flattened tokens, int64 `[num_steps, batch_size]`; -1: an empty place.
    """
    steps: list[list[int]] = []
    for first in range(0, len(lengths), batch_size):
        batch = lengths[first : first + batch_size]
        steps += [_step(list(enumerate(batch, first)), position, batch_size, width) for position in range(max(batch))]
    return torch.tensor(steps, dtype=torch.long).view(-1, batch_size)


def _step(rows: list[tuple[int, int]], position: int, batch_size: int, width: int) -> list[int]:
    step = [row * width + position if position < length else -1 for row, length in rows]
    return step + [-1] * (batch_size - len(step))


def refilled_steps(lengths: Sequence[int], batch_size: int, width: int) -> Tensor:
    """Decode steps of an engine that never waits: a place whose row has ended takes the next row. As `static_steps`."""
    waiting = iter([(row, length) for row, length in enumerate(lengths) if length])
    places: list[tuple[int, int, int] | None] = [None] * batch_size
    steps: list[list[int]] = []
    while True:
        for place, current in enumerate(places):
            if current is None or current[1] == current[2]:
                following = next(waiting, None)
                places[place] = None if following is None else (following[0], 0, following[1])
        if not any(places):
            return torch.tensor(steps, dtype=torch.long).view(-1, batch_size)
        steps.append([-1 if current is None else current[0] * width + current[1] for current in places])
        places = [None if current is None else (current[0], current[1] + 1, current[2]) for current in places]


def reroute_groups(
    topk_weights: Tensor,
    topk_ids: Tensor,
    similarity: Tensor,
    *,
    primary_top_k: int,
    thresholds: Tensor,
) -> Tensor:
    """Re-route groups of rows as if each were one decode step: `sere.ops.reference.reroute_reference`, group by group.

    Args:
        topk_weights: Float `[num_groups, num_tokens, top_k]`.
        topk_ids: int64, same shape; no unused slots.
        similarity: float32 `[num_experts, num_experts]`; row: the expert replaced, column: its replacement.
        primary_top_k: Slots per row that vote (the paper's S).
        thresholds: float32 `[num_thresholds]`: least similarities that re-route (the paper's rho).

    Returns:
        New ids, int64 `[num_thresholds, num_groups, num_tokens, top_k]`.
    """
    num_groups, _, top_k = topk_ids.shape
    num_experts = similarity.shape[0]
    rows = topk_ids.reshape(-1, top_k)
    votes = voting_slots(topk_weights.reshape(-1, top_k), rows, primary_top_k, None).view(topk_ids.shape)
    # Slots without a vote write to one expert past the last.
    voted = torch.where(votes, topk_ids, num_experts).view(num_groups, -1)
    primary = torch.zeros(num_groups, num_experts + 1, dtype=torch.bool, device=topk_ids.device).scatter_(1, voted, True)
    primary = primary[:, :num_experts]
    own = torch.arange(num_experts, device=topk_ids.device)
    tables = []
    for part in primary.split(max(1, _BLOCK_ELEMENTS // num_experts**2)):
        # max returns the first, lowest, of equal experts.
        best, replacement = similarity.masked_fill(~part.unsqueeze(1), -torch.inf).max(dim=2)
        reroutes = (best >= thresholds.view(-1, 1, 1)) & ~part
        tables.append(torch.where(reroutes, replacement, own))
    table = torch.cat(tables, dim=1)
    ids = topk_ids.reshape(1, num_groups, -1).expand(len(thresholds), -1, -1)
    return table.gather(2, ids).view(len(thresholds), *topk_ids.shape)


def num_active(ids: Tensor, num_experts: int) -> Tensor:
    """Active experts, summed over the groups of `[num_groups, num_tokens, top_k]`."""
    hit = torch.zeros(len(ids), num_experts, dtype=torch.bool, device=ids.device)
    return hit.scatter_(1, ids.reshape(len(ids), -1), True).sum()
