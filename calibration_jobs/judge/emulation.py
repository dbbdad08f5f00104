"""Teacher-forced decode emulation: a policy's effect on the whole model's predictions, at a stated decode batch.

Held-out text runs through the Transformers model with every token given, and the policy is applied to groups of tokens at the
same position of different sequences, as a decode step would see them. Deterministic: no token is drawn.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sere.calibration_jobs.capture.batches import pad_rows
from sere.calibration_jobs.capture.experts import ExpertsCall, intercept_experts
from sere.calibration_jobs.judge.candidates import Emulated
from sere.ops.policies.policy import LayerInfo, Policy
from sere.ops.reference import DECODE, PADDING

SUMS = ("nll", "kl", "agreement", "tokens", "active_experts", "layer_steps")
"""What is summed for each configuration: over predicted tokens, and over steps and layers."""
# Elements of log-probabilities held at once beside the logits (256 MiB of float64).
_BLOCK_ELEMENTS = 1 << 25


class PolicyRouter:
    """Routes each position of a batch of sequences as one decode step under a policy."""

    def __init__(self, emulated: Emulated, valid: Tensor) -> None:
        """Nothing is routed yet.

        Args:
            emulated: The policy.
            valid: bool `[num_sequences, sequence_length]`; other tokens are padding.
        """
        self._emulated = emulated
        self._valid = valid
        self._policies: dict[int, Policy] = {}
        self.num_active = 0
        self.num_layer_steps = 0

    def _policy(self, call: ExpertsCall, weights: Tensor) -> Policy:
        if call.layer not in self._policies:
            totals = weights.sum(1)
            layer = LayerInfo(
                index=call.layer,
                num_experts=call.module.num_experts,
                top_k=weights.shape[1],
                # Told from the weights themselves, which all families have: scaled ones have the same sum in every row.
                renormalize=bool((totals - totals[0]).abs().max() < 1e-2 * totals[0].abs()),
                device=torch.device("cpu"),
            )
            matrices = self._emulated.matrices
            tables = {self._emulated.reroute.metric: matrices[call.layer]} if matrices is not None else None
            self._policies[call.layer] = Policy(self._emulated.reroute, layer, tables)
        return self._policies[call.layer]

    def __call__(self, call: ExpertsCall) -> Tensor:
        """The layer's output under the policy."""
        shape = (*self._valid.shape, call.topk_ids.shape[1])
        weights, ids = call.topk_weights.float().cpu(), call.topk_ids.cpu()
        policy = self._policy(call, weights)
        new_weights, new_ids = weights.view(shape).clone(), ids.view(shape).clone()
        roles = torch.where(self._valid, DECODE, PADDING).to(torch.int8)
        for position in range(shape[1]):
            step_weights = weights.view(shape)[:, position].contiguous()
            step_ids = ids.view(shape)[:, position].contiguous()
            role = roles[:, position].contiguous()
            routed_weights, routed_ids = policy.route(step_weights, step_ids, weights.new_empty(0), role)
            new_weights[:, position], new_ids[:, position] = routed_weights, routed_ids
            self.num_active += len(routed_ids[role == DECODE].unique())
            self.num_layer_steps += 1
        if torch.equal(new_ids.view_as(ids), ids) and torch.equal(new_weights.view_as(weights), weights):
            return call.run()
        return call.run(new_ids.view_as(ids).to(call.topk_ids), new_weights.view_as(weights).to(call.topk_weights))


def _predictions(model: nn.Module, batch: dict[str, Tensor], handle: Callable[[ExpertsCall], Tensor] | None) -> Tensor:
    if handle is None:
        return model(**batch, use_cache=False).logits
    with intercept_experts(model, handle):
        return model(**batch, use_cache=False).logits


def emulate(model: nn.Module, rows: Sequence[Sequence[int]], policies: Sequence[Emulated], *, device: Any = "cpu") -> Tensor:
    """Sums of figures for one decode batch: as many sequences as `rows` has.

    Args:
        model: A Transformers MoE model in evaluation mode.
        rows: Tokens of different sequences, two at least in each to predict anything.
        policies: What is compared with the unmodified model.
        device: Where the model's inputs belong.

    Returns:
        float64 `[num_policies, len(SUMS)]`.
    """
    batch = pad_rows(rows, device)
    valid = batch["attention_mask"].bool()
    predicted = valid[:, 1:].flatten()
    targets = batch["input_ids"][:, 1:].flatten()[predicted]
    sums = torch.zeros(len(policies), len(SUMS), dtype=torch.float64)
    with torch.inference_mode():
        unmodified = _predictions(model, batch, None)[:, :-1].flatten(0, 1)[predicted]
        block = max(1, _BLOCK_ELEMENTS // unmodified.shape[1])
        for line, emulated in zip(sums, policies, strict=True):
            router = PolicyRouter(emulated, valid.cpu())
            logits = _predictions(model, batch, router)[:, :-1].flatten(0, 1)[predicted]
            for ours, theirs, tokens in zip(logits.split(block), unmodified.split(block), targets.split(block), strict=True):
                log_p, log_q = theirs.double().log_softmax(1), ours.double().log_softmax(1)
                line[0] -= log_q.gather(1, tokens[:, None]).sum().cpu()
                line[1] += (log_p.exp() * (log_p - log_q)).sum().cpu()
                line[2] += (ours.argmax(1) == theirs.argmax(1)).sum().cpu()
            line[3:] += torch.tensor([len(targets), router.num_active, router.num_layer_steps], dtype=torch.float64)
    return sums
