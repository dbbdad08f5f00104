"""One MoE layer of an engine worker at work: its policy, its compensation, its counters."""

from typing import Any

import torch
from torch import Tensor

from sere.ops.engine.roles import TokenRoles
from sere.ops.policies.compensation import Compensator
from sere.ops.policies.policy import Policy

ATTRIBUTE = "sere_layer"
"""The attribute of a `MoERunner` that is its `LayerState`."""


class LayerState:
    """What the hooks of a layer call."""

    def __init__(self, policy: Policy, roles: TokenRoles) -> None:
        """Make a layer without counters and compensation.

        Args:
            policy: Replaced at the end of the engine's start where it needs to know the router's scores.
            roles: The worker's.
        """
        self.roles = roles
        self.counters: Tensor | None = None
        self.policy = policy
        self._compensator: Compensator | None = None
        self._difference: Tensor | None = None
        self._share = 1.0
        self._is_owed = False

    @property
    def policy(self) -> Policy:
        """The layer's policy."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._policy, self._changes_routing = policy, policy.changes_routing

    @property
    def has_work(self) -> bool:
        """Whether steps need anything done at all."""
        return self._changes_routing or self.counters is not None

    def compensate_with(self, compensator: Compensator, difference: Tensor, share: float) -> None:
        """From now on add what experts have lost.

        Args:
            compensator: Of this layer.
            difference: float32 `[capacity, num_experts]`, which other layers may share: a layer's output is compensated before
                the next layer routes.
            share: Of this rank, as ranks' outputs are summed.
        """
        self._compensator, self._difference, self._share = compensator, difference, share

    def route(self, topk_weights: Tensor, topk_ids: Tensor, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the policy to one step and count what it did: `Policy.route_and_count`.

        Raises:
            RuntimeError: if the step has more rows than roles, or the last one was not compensated.
        """
        if self.counters is None and not self._changes_routing:
            return topk_weights, topk_ids
        roles, num_rows = self.roles, topk_ids.shape[0]
        if num_rows > roles.capacity:
            raise RuntimeError(
                f"a step has {num_rows} rows, more than the {roles.capacity} that max_num_batched_tokens allows: token roles "
                "cannot be known"
            )
        difference = None
        if self._compensator is not None and roles.may_reroute:
            if self._is_owed:
                raise RuntimeError(
                    f"the output of layer {self.policy.layer.index} was not compensated, perhaps by a graph that was compiled "
                    "for another policy: remove vLLM's compile cache (VLLM_CACHE_ROOT), or use compensation none"
                )
            difference, self._is_owed = self._difference, True
        return self._policy.route_and_count(
            topk_weights,
            topk_ids,
            router_logits,
            roles.rows(num_rows),
            step=roles.step,
            counters=self.counters,
            difference=difference,
        )

    def compensate(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        """Add to the output of the routed experts what the step's routing took away.

        Args:
            output: `[num_tokens, hidden_size]`, not yet summed over ranks, scaled, or joined by shared experts.
            hidden_states: The experts' input, same shape.

        Returns:
            A new tensor, or `output` itself in a step that re-routes nothing.
        """
        if self._compensator is None or not self._is_owed:
            return output
        assert self._difference is not None
        self._is_owed = False
        return self._compensator.add(output, hidden_states, self._difference[: output.shape[0]], self._share)


def layer_of(layer_name: str) -> LayerState:
    """The layer of a custom op, found through vLLM's forward context, so that several engines can live in one process."""
    from vllm.forward_context import get_forward_context

    runner: Any = get_forward_context().no_compile_layers[layer_name]
    return getattr(runner, ATTRIBUTE)


def is_traced() -> bool:
    """Whether torch.compile traces the caller: then what happens must be a custom op."""
    return torch.compiler.is_compiling()
