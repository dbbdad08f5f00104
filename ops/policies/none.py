"""Policy `none`: the unmodified model, counted."""

from torch import Tensor

from sere.ops.policies.one_launch import OneLaunchPolicy


class NonePolicy(OneLaunchPolicy):
    """Changes nothing: what every other policy is compared with."""

    @property
    def voting_top_k(self) -> int:
        # Where nothing is re-routed, a kept slot is not critical: count as if every slot voted.
        return self.layer.top_k

    def route(self, topk_weights: Tensor, topk_ids: Tensor, router_logits: Tensor, roles: Tensor) -> tuple[Tensor, Tensor]:
        return topk_weights, topk_ids
