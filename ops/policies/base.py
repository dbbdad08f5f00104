"""What every policy is, and what it knows of its layer.

One object per policy and MoE layer. A policy sees tensors of fixed shape and keeps no state between steps, so the same
code runs eagerly and inside a CUDA graph.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sere.conf.errors import ConfigError
from sere.conf.schema import RerouteConfig
from sere.ops.kernels.counting import count_step


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """What a policy knows of its layer."""

    index: int
    num_experts: int
    top_k: int
    renormalize: bool | None
    """Whether the model's router scales the selected weights to a fixed sum; None: it does not say."""
    device: torch.device


class Policy(ABC):
    """Maps the routing of one step of one layer to another one."""

    needs_similarity = False
    devices: tuple[str, ...] | None = None
    """Types of the devices it works on; None: all that torch has."""

    def __init__(self, config: RerouteConfig, layer: LayerInfo, similarity: Tensor | None = None) -> None:
        """Make the policy of one layer.

        Args:
            config: The settings.
            layer: The layer this policy works for.
            similarity: float32 `[num_experts, num_experts]`, for policies with `needs_similarity`.

        Raises:
            ConfigError: if `primary_top_k` is above the layer's top_k.
        """
        self.config = config
        self.layer = layer
        if self.voting_top_k > layer.top_k:
            raise ConfigError(
                f"primary_top_k must be between 1 and the model's top_k ({layer.top_k}), got {config.primary_top_k}"
            )

    @property
    def voting_top_k(self) -> int:
        """Slots per decode row that vote."""
        return self.config.primary_top_k

    @property
    def changes_routing(self) -> bool:
        """Whether there is any step whose routing this policy changes."""
        return self.voting_top_k < self.layer.top_k

    @abstractmethod
    def route(self, topk_weights: Tensor, topk_ids: Tensor, router_logits: Tensor, roles: Tensor) -> tuple[Tensor, Tensor]:
        """Change the routing of the decode rows.

        Args:
            topk_weights: float32 `[num_tokens, top_k]`.
            topk_ids: int32 or int64 `[num_tokens, top_k]`.
            router_logits: The router's scores before selection, `[num_tokens, num_experts]`.
            roles: int8 `[num_tokens]`: 0 padding, 1 prefill, 2 decode. Only rows with role 2 may change.

        Returns:
            Weights and ids of the same shapes and dtypes; never the argument tensors changed in place.
        """

    def route_and_count(
        self,
        topk_weights: Tensor,
        topk_ids: Tensor,
        router_logits: Tensor,
        roles: Tensor,
        *,
        step: Tensor,
        counters: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Route one step of an engine as fast as this policy can on its device, and count what that did.

        Args:
            topk_weights: As in `route`, and the next three.
            topk_ids: May be changed in place on a GPU: routers return a new tensor, and a copy would be another launch.
            router_logits: As in `route`.
            roles: As in `route`.
            step: int64 `[3]` (`TokenRoles.step`).
            counters: int64 `[len(COUNTERS)]`, added to. None: nothing is counted.

        Returns:
            Weights and ids as in `route`, but the ids may be the argument.
        """
        weights, ids = self.route(topk_weights, topk_ids, router_logits, roles)
        if counters is not None:
            count_step(
                counters,
                topk_weights=topk_weights,
                ids_before=topk_ids,
                ids_after=ids,
                roles=roles,
                num_decode_rows=step[0],
                num_experts=self.layer.num_experts,
                primary_top_k=self.voting_top_k,
            )
        return weights, ids
