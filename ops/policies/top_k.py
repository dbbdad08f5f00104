"""Policy `top_k`: plain top-k reduction."""

import torch
from torch import Tensor

from sere.conf.errors import ConfigError
from sere.conf.schema import RerouteConfig
from sere.ops.kernels.votes import voting_slots
from sere.ops.policies.base import LayerInfo, Policy
from sere.ops.reference import DECODE


class TopKPolicy(Policy):
    """Keeps the `primary_top_k` highest-weighted slots of a decode row and drops the others.

    A dropped slot gets weight 0 and the id of the row's highest-weighted expert, which every MoE kernel accepts and which
    makes no further expert active. Where the model renormalises, the kept weights are scaled to the sum of all. Torch
    operations on every device.
    """

    def __init__(self, config: RerouteConfig, layer: LayerInfo, similarity: Tensor | None = None) -> None:
        super().__init__(config, layer, similarity)
        if layer.renormalize is None:
            raise ConfigError(
                f"policy 'top_k' cannot tell whether the router of layer {layer.index} renormalises its weights: use another "
                "policy"
            )

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
