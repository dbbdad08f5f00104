"""Routes a model's tokens as an engine would: step by step, under a policy, with its compensation."""

import torch
from torch import Tensor

from sere.calibration_jobs.capture.experts import ExpertsCall
from sere.calibration_jobs.judge.candidates import Emulated
from sere.ops.kernels.counting import COUNTERS
from sere.ops.policies.compensation import Compensator
from sere.ops.policies.policy import LayerInfo, Policy
from sere.ops.reference import DECODE, PREFILL

_CPU = torch.device("cpu")


class PolicyRouter:
    """Routes the tokens of one forward pass in decode steps; a handler of `intercept_experts`."""

    def __init__(self, emulated: Emulated, steps: Tensor) -> None:
        """Nothing is routed yet.

        Args:
            emulated: The policy.
            steps: int64 `[num_steps, batch_size]`: which of a call's tokens share a step; -1: an empty place. Tokens of no
                step are left alone, as prompts are.
        """
        self._emulated = emulated
        self._steps = [step[step >= 0] for step in steps]
        self._layers: dict[int, tuple[Policy, Compensator | None]] = {}
        self._counters = torch.zeros(len(COUNTERS), dtype=torch.int64)
        self.charge = 0.0
        """What compensation reads in a step of a layer, in experts: all its tables, as if all were read; a mean over layers."""

    @property
    def counts(self) -> dict[str, int]:
        """`COUNTERS`, summed over layers."""
        return dict(zip(COUNTERS, self._counters.tolist(), strict=True))

    def _layer(self, call: ExpertsCall, weights: Tensor) -> tuple[Policy, Compensator | None]:
        if call.layer not in self._layers:
            totals = weights.sum(1)
            info = LayerInfo(
                index=call.layer,
                num_experts=call.module.num_experts,
                top_k=weights.shape[1],
                # Told from the weights themselves, which all families have: scaled ones have the same sum in every row.
                renormalize=bool((totals - totals[0]).abs().max() < 1e-2 * totals[0].abs()),
                device=_CPU,
                scoring=call.scoring,
            )
            tables = (self._emulated.tables or {}).get(call.layer, {})
            policy = Policy(self._emulated.reroute, info, tables)
            compensation, states = policy.rules.compensation, call.hidden_states
            adds = compensation.rule != "none" and policy.changes_routing
            compensator = Compensator(compensation, tables, device=states.device, dtype=states.dtype) if adds else None
            self._layers[call.layer] = policy, compensator
            if compensator is not None:
                expert = sum(parameter.numel() for parameter in call.module.parameters()) / call.module.num_experts
                self.charge += (compensator.num_values / expert - self.charge) / len(self._layers)
        return self._layers[call.layer]

    def __call__(self, call: ExpertsCall) -> Tensor:
        """The layer's output under the policy."""
        weights, ids = call.topk_weights.float().cpu(), call.topk_ids.cpu()
        policy, compensator = self._layer(call, weights)
        needs_logits = policy.rules.needs_scores and policy.changes_routing
        logits = call.router_logits().float().cpu() if needs_logits else None
        new_weights, new_ids = weights.clone(), ids.clone()
        difference = torch.zeros(len(ids), policy.layer.num_experts) if compensator is not None else None
        for rows in self._steps:
            size = len(rows)
            if not size:
                continue
            # As the engine's roles do it: steps that are left alone have no decode rows.
            routed = size >= self._emulated.reroute.min_tokens
            lost = torch.zeros(size, policy.layer.num_experts) if difference is not None else None
            new_weights[rows], new_ids[rows] = policy.route_and_count(
                weights[rows],
                ids[rows],
                logits[rows] if logits is not None else weights.new_empty(size, 0),
                torch.full((size,), DECODE if routed else PREFILL, dtype=torch.int8),
                step=torch.tensor([size, size, int(routed)]),
                counters=self._counters,
                difference=lost,
            )
            if difference is not None and lost is not None:
                difference[rows] = lost
        if torch.equal(new_ids, ids) and torch.equal(new_weights, weights):
            return call.run()
        output = call.run(new_ids.to(call.topk_ids), new_weights.to(call.topk_weights))
        if compensator is None or difference is None:
            return output
        return compensator.add(output, call.hidden_states, difference.to(output.device))
