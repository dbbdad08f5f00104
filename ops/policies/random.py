"""Policy `random`: re-routing as `sere` does it, without what similarity knows."""

import torch
from torch import Tensor

from sere.conf.schema import RerouteConfig
from sere.ops.policies.base import LayerInfo
from sere.ops.policies.sere import SerePolicy


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
