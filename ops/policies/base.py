"""Routing policies: what happens to the experts a router selected. Chosen by name from `POLICIES`.

One object per policy and MoE layer. A policy sees tensors of fixed shape and keeps no state between steps, so the same
code runs eagerly and inside a CUDA graph.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from sere.conf.errors import ConfigError
from sere.conf.schema import RerouteConfig
from sere.ops.op import reroute_topk, voting_slots
from sere.ops.reference import DECODE


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """What a policy knows of its layer."""

    index: int
    num_experts: int
    top_k: int
    renormalize: bool
    """Whether the model's router scales the selected weights to a fixed sum."""
    device: torch.device


class Policy(ABC):
    """Maps the routing of one step of one layer to another one."""

    needs_similarity = False
    neighbours: Tensor | None = None
    """int16 `[num_experts, n]` for the CUDA kernel (`sorted_neighbours`), if the policy re-routes by similarity."""

    def __init__(self, config: RerouteConfig, layer: LayerInfo, similarity: Tensor | None = None) -> None:
        """Args:
        config: The settings.
        layer: The layer this policy works for.
        similarity: float32 `[num_experts, num_experts]`, for policies with `needs_similarity`.

        Raises:
            ConfigError: if `primary_top_k` is above the layer's top_k.
        """
        if config.policy != "none" and config.primary_top_k > layer.top_k:
            raise ConfigError(
                f"primary_top_k must be between 1 and the model's top_k ({layer.top_k}), got {config.primary_top_k}"
            )
        self.config = config
        self.layer = layer

    @property
    def changes_routing(self) -> bool:
        """Whether there is any step whose routing this policy changes."""
        return self.config.policy != "none" and self.config.primary_top_k < self.layer.top_k

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


class NonePolicy(Policy):
    """Changes nothing: the unmodified model, counted."""

    def route(self, topk_weights: Tensor, topk_ids: Tensor, router_logits: Tensor, roles: Tensor) -> tuple[Tensor, Tensor]:
        return topk_weights, topk_ids


class SerePolicy(Policy):
    """Each secondary expert is replaced by the primary expert most similar to it (arXiv 2602.07616).

    Differs from the paper's code: slots are ranked by weight, not by position; prompts are left alone unless `phase` is all;
    padding rows do not vote.
    """

    needs_similarity = True

    def __init__(self, config: RerouteConfig, layer: LayerInfo, similarity: Tensor | None = None) -> None:
        super().__init__(config, layer, similarity)
        assert similarity is not None
        self.similarity = similarity.to(layer.device)
        self.threshold = self._least_similarity()
        if layer.device.type == "cuda" and self.changes_routing:
            from sere.ops.kernels.cuda import sorted_neighbours

            self.neighbours = sorted_neighbours(similarity, self.threshold).to(layer.device)

    def _least_similarity(self) -> float:
        return self.config.threshold

    def route(self, topk_weights: Tensor, topk_ids: Tensor, router_logits: Tensor, roles: Tensor) -> tuple[Tensor, Tensor]:
        new_ids = reroute_topk(
            topk_weights,
            topk_ids,
            self.similarity,
            primary_top_k=self.config.primary_top_k,
            threshold=self.threshold,
            roles=roles,
        )
        return topk_weights, new_ids


def random_similarity(seed: int, layer: int, num_experts: int) -> Tensor:
    """A random similarity of one layer, float32 `[num_experts, num_experts]`, not symmetric, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
    return torch.rand((num_experts, num_experts), generator=generator, dtype=torch.float32, device="cpu")


class RandomPolicy(SerePolicy):
    """Each secondary expert is replaced by a random primary expert: how much does similarity matter?

    The most similar primary expert under a random similarity, drawn once per layer, is a uniformly random one; nothing is
    drawn while decoding.
    """

    needs_similarity = False

    def __init__(self, config: RerouteConfig, layer: LayerInfo, similarity: Tensor | None = None) -> None:
        super().__init__(config, layer, random_similarity(config.seed, layer.index, layer.num_experts))

    def _least_similarity(self) -> float:
        return 0.0


class TopKPolicy(Policy):
    """Keeps the `primary_top_k` highest-weighted slots of a decode row and drops the others: plain top-k reduction.

    A dropped slot gets weight 0 and the id of the row's highest-weighted expert, which every MoE kernel accepts and which
    makes no further expert active. Where the model renormalises, the kept weights are scaled to the sum of all.
    """

    def route(self, topk_weights: Tensor, topk_ids: Tensor, router_logits: Tensor, roles: Tensor) -> tuple[Tensor, Tensor]:
        decode = (roles == DECODE).unsqueeze(1)
        kept = voting_slots(topk_weights, topk_ids, self.config.primary_top_k, None)
        used = topk_ids >= 0
        dropped = decode & used & ~kept
        weights = topk_weights.masked_fill(dropped, 0)
        if self.layer.renormalize:
            scale = topk_weights.sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1e-20)
            weights = torch.where(decode, weights * scale, weights)
        first = topk_ids.gather(1, topk_weights.masked_fill(~used, -torch.inf).argmax(1, keepdim=True))
        return weights, torch.where(dropped, first, topk_ids)


POLICIES: Mapping[str, type[Policy]] = MappingProxyType(
    {"none": NonePolicy, "sere": SerePolicy, "top_k": TopKPolicy, "random": RandomPolicy}
)
