"""Policy `sere`: re-routing by similarity (arXiv 2602.07616)."""

import torch
from torch import Tensor

from sere.conf.schema import RerouteConfig
from sere.ops.kernels.neighbours import neighbours_of
from sere.ops.op import reroute_topk
from sere.ops.policies.base import LayerInfo
from sere.ops.policies.one_launch import OneLaunchPolicy


class SerePolicy(OneLaunchPolicy):
    """Each secondary expert is replaced by the primary expert most similar to it.

    Differs from the paper's code: slots are ranked by weight, not by position; prompts are left alone unless `phase` is all;
    padding rows do not vote.
    """

    needs_similarity = True
    devices = ("cpu", "cuda")

    def __init__(self, config: RerouteConfig, layer: LayerInfo, similarity: Tensor | None = None) -> None:
        super().__init__(config, layer, similarity)
        assert similarity is not None
        with torch.inference_mode(False):
            # On a GPU a copy, and one whose neighbours can be cached, whatever mode the engine loads its model in.
            self.similarity = similarity.to(layer.device)
        self.threshold = self._least_similarity()
        if self.uses_kernel and self.changes_routing:
            self.neighbours = neighbours_of(self.similarity, self.threshold)

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
