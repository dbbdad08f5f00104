"""Policies whose step on a GPU, counters included, is one launch of `kernels/reroute.cu`."""

import torch
from torch import Tensor

from sere.conf.errors import ConfigError
from sere.conf.schema import RerouteConfig
from sere.ops.kernels import cuda
from sere.ops.policies.base import LayerInfo, Policy


class OneLaunchPolicy(Policy):
    """Replaces ids by similarity, or changes nothing; weights stay. Elsewhere than on a GPU it is `route`, then a count."""

    neighbours: Tensor | None = None
    """int16 `[num_experts, n]` of the experts that may replace each one (`kernels/neighbours.py`). None: none may."""

    def __init__(self, config: RerouteConfig, layer: LayerInfo, similarity: Tensor | None = None) -> None:
        super().__init__(config, layer, similarity)
        self.uses_kernel = layer.device.type == "cuda"
        if self.uses_kernel and (layer.num_experts > cuda.MAX_EXPERTS or layer.top_k > cuda.MAX_TOP_K):
            raise ConfigError(
                f"layer {layer.index} has {layer.num_experts} experts and top_k {layer.top_k}, the CUDA kernel takes at most "
                f"{cuda.MAX_EXPERTS} and {cuda.MAX_TOP_K}: remove `sere` from additional_config"
            )

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
        if not self.uses_kernel:
            return super().route_and_count(topk_weights, topk_ids, router_logits, roles, step=step, counters=counters)
        if topk_ids.dtype == torch.uint32:
            topk_ids = topk_ids.view(torch.int32)
        ids = topk_ids.contiguous()
        cuda.reroute(
            topk_weights.float().contiguous(),
            ids,
            self.neighbours,
            num_experts=self.layer.num_experts,
            primary_top_k=self.voting_top_k,
            new_ids=ids,
            roles=roles,
            step=step,
            counters=counters,
        )
        return topk_weights, ids
