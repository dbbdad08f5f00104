"""Held-out re-routing error: how far re-routing moves each MoE layer's output, on tokens that no matrix was computed from.

Every token goes through all experts once; each configuration's output is then a weighted sum of what is already there.
The layer's output is that of its routed experts. A shared expert, where the model has one, adds the same to both sides.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sere.calibration_jobs.capture.batches import pad_rows
from sere.calibration_jobs.capture.experts import ExpertsCall, intercept_experts
from sere.calibration_jobs.judge.candidates import Candidate
from sere.calibration_jobs.judge.decode_steps import decode_groups, num_active, reroute_groups

# Elements of the configurations' outputs held at once (256 MiB of float32).
_BLOCK_ELEMENTS = 1 << 26
SUMS = (
    "squared_error",
    "squared_output",
    "aligned",
    "tokens",
    "secondary",
    "critical",
    "active_before",
    "active_after",
    "steps",
)
"""What is summed for each configuration and layer. `aligned` are cosines of a token's output before and after; `secondary` and
`critical` are slots whose expert is not primary, and those of them that keep it."""


def routing_error(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    candidates: Sequence[Candidate],
    *,
    primary_top_k: Sequence[int],
    batch_sizes: Sequence[int],
    block_tokens: int,
    device: Any = "cpu",
) -> dict[int, Tensor]:
    """Sums of errors and counts over one batch of sequences, for every layer and setting.

    Args:
        model: A Transformers MoE model in evaluation mode.
        rows: Tokens of different sequences.
        candidates: Matrices with their thresholds.
        primary_top_k: Values of S, below the model's top_k.
        batch_sizes: Decode batches.
        block_tokens: Most tokens for which all experts' outputs are held at once.
        device: Where the model's inputs belong.

    Returns:
        float64 `[num_settings, len(SUMS)]` by layer; settings as in `settings_of`.
    """
    # Sequences of like lengths share steps; equal ones stay in order, so domains stay mixed.
    rows = sorted(rows, key=len, reverse=True)
    batch = pad_rows(rows, device)
    valid = batch["attention_mask"].bool().cpu()
    groups = {size: decode_groups(valid, size) for size in batch_sizes}
    sums: dict[int, Tensor] = {}

    def handle(call: ExpertsCall) -> Tensor:
        sums[call.layer] = _layer_sums(call, groups, candidates, primary_top_k, block_tokens)
        return call.run()

    with torch.inference_mode(), intercept_experts(model, handle):
        model(**batch, use_cache=False, logits_to_keep=1)
    return sums


def _layer_sums(
    call: ExpertsCall,
    groups: Mapping[int, Tensor],
    candidates: Sequence[Candidate],
    primary_top_k: Sequence[int],
    block_tokens: int,
) -> Tensor:
    """One layer: float64 `[num_settings, len(SUMS)]`."""
    device = call.hidden_states.device
    ids, weights = call.topk_ids.long(), call.topk_weights.float()
    num_tokens, num_experts = len(ids), call.module.num_experts
    counts, new_ids, members = [], [], []
    for index in groups.values():
        index = index.to(device)
        before, ranked = ids[index], weights[index]
        member = torch.zeros(num_tokens, dtype=torch.bool, device=device).index_fill_(0, index.flatten(), True)
        active_before = num_active(before, num_experts)
        for candidate in candidates:
            similarity = candidate.matrices[call.layer].to(device)
            thresholds = torch.tensor(candidate.thresholds, dtype=torch.float32, device=device)
            for top_k in primary_top_k:
                # Without a threshold every secondary slot is re-routed.
                least = torch.cat((thresholds, thresholds.new_tensor([-torch.inf])))
                *after, everything = reroute_groups(ranked, before, similarity, primary_top_k=top_k, thresholds=least)
                secondary = everything != before
                for routed in after:
                    moved = routed != before
                    counts.append(
                        (
                            secondary.sum(),
                            (secondary & ~moved).sum(),
                            active_before,
                            num_active(routed, num_experts),
                            len(index),
                        )
                    )
                    whole = ids.clone()
                    whole[index] = routed
                    new_ids.append(whole)
                    members.append(member)
    changed, counted = torch.stack(new_ids), torch.stack(members)
    squares = torch.zeros(len(changed), 4, dtype=torch.float64, device=device)
    wanted = counted.any(0).nonzero().squeeze(1)
    for part in wanted.split(block_tokens):
        outputs = call.all_experts(call.hidden_states[part]).float().transpose(0, 1)  # [tokens, num_experts, hidden]
        step = max(1, _BLOCK_ELEMENTS // (len(changed) * outputs.shape[2]))
        for few, rows in zip(part.split(step), outputs.split(step), strict=True):
            # Each setting's change as coefficients of the experts: one product for all settings.
            share = weights[few].unsqueeze(1)
            own = torch.zeros(len(few), 1, num_experts, device=device).scatter_add_(2, ids[few].unsqueeze(1), share)
            new = torch.zeros(len(few), len(changed), num_experts, device=device)
            new.scatter_add_(2, changed[:, few].transpose(0, 1), share.expand(-1, len(changed), -1))
            counts_here = counted[:, few].T.double()
            before, after = own @ rows, new @ rows
            cosine = torch.nn.functional.cosine_similarity(before, after, dim=2)
            for place, values in enumerate(((after - before).square().sum(2), before.square().sum(2), cosine)):
                squares[:, place] += values.double().mul(counts_here).sum(0)
            squares[:, 3] += counts_here.sum(0)
    figures = torch.tensor([[float(value) for value in row] for row in counts], dtype=torch.float64)
    return torch.cat((squares.cpu(), figures), dim=1)
