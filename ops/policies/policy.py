"""A policy at work in one layer: votes, then targets, then weights. One object per MoE layer.

It sees tensors of fixed shape and keeps no state between steps, so the same code runs eagerly and inside a CUDA graph.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sere.conf.errors import ConfigError
from sere.conf.schema import RerouteConfig
from sere.conf.schema.rules import Rules
from sere.ops.kernels.counting import count_step
from sere.ops.policies.scoring import Scoring
from sere.ops.policies.targets import move, similarity_of
from sere.ops.policies.votes import RoutedStep, cast_votes
from sere.ops.policies.weights import difference_of, weigh


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """What a policy knows of its layer."""

    index: int
    num_experts: int
    top_k: int
    renormalize: bool | None
    """Whether the model's router scales the selected weights to a fixed sum; None: it does not say."""
    device: torch.device
    scoring: Scoring | None = None
    """How the router makes scores of its logits; None: it cannot be followed, only its choice is known."""


class FastStep(Protocol):
    """A whole step of one layer in compiled code: `Policy.route_and_count`."""

    def __call__(
        self,
        topk_weights: Tensor,
        topk_ids: Tensor,
        router_logits: Tensor,
        roles: Tensor,
        *,
        step: Tensor | None,
        counters: Tensor | None,
        difference: Tensor | None,
    ) -> tuple[Tensor, Tensor]: ...


def _fast_step(rules: Rules, layer: LayerInfo, similarity: Tensor | None, tables: Mapping[str, Tensor]) -> FastStep | None:
    """The compiled code for a policy on the layer's device; None where there is none."""
    if layer.device.type == "cuda":
        from sere.ops.kernels.cuda import launched_step

        return launched_step(rules, layer, similarity, tables)
    if layer.device.type == "cpu":
        from sere.ops.kernels.cpu import compiled_step

        return compiled_step(rules, layer, similarity, tables)
    return None


class Policy:
    """Maps the routing of one step of one layer to another one."""

    def __init__(self, config: RerouteConfig, layer: LayerInfo, tables: Mapping[str, Tensor] | None = None) -> None:
        """Make the policy of one layer.

        Args:
            config: The settings, resolved.
            layer: The layer this policy works for.
            tables: The layer's similarities and tables by name; those that the policy needs must be among them.

        Raises:
            ConfigError: if the layer, or what is known of it, does not allow this policy.
        """
        self.config, self.layer = config, layer
        self.rules = rules = _simplest(config.rules(layer.index), layer)
        known = dict(tables or {})
        _refuse(config.policy, rules, layer, known)
        with torch.inference_mode(False):
            # On a GPU copies, whatever mode the engine loads its model in. Compensation keeps its own, in its own type.
            self._tables = {
                name: known[name].to(layer.device) for name in rules.tables() if not name.startswith(("surrogate", "means"))
            }
            found = similarity_of(rules.targets, self._tables, layer.index, layer.num_experts)
            self.similarity = None if found is None else found.to(layer.device)
        self.weight_rule = rules.weights_where(layer.renormalize)
        self.fast = _fast_step(rules, layer, self.similarity, self._tables)

    @property
    def changes_routing(self) -> bool:
        """Whether there is any step whose routing this policy changes."""
        return self.rules.changes_routing(self.layer.top_k)

    def route(self, topk_weights: Tensor, topk_ids: Tensor, router_logits: Tensor, roles: Tensor) -> tuple[Tensor, Tensor]:
        """Change the routing of the decode rows, in torch operations: `sere.ops.reference.route_reference`, on any device.

        Args:
            topk_weights: float32 `[num_tokens, top_k]`.
            topk_ids: int32 or int64 `[num_tokens, top_k]`.
            router_logits: The router's scores before selection, `[num_tokens, num_experts]`; any, where the policy needs none.
            roles: int8 `[num_tokens]`: 0 padding, 1 prefill, 2 decode. Only rows with role 2 may change.

        Returns:
            Weights and ids of the same shapes and dtypes; never the argument tensors changed in place.
        """
        step = self._step(topk_weights, topk_ids, router_logits, roles)
        weights, ids, _ = self._route(step)
        return weights.to(topk_weights.dtype), ids.to(topk_ids.dtype)

    def route_and_count(
        self,
        topk_weights: Tensor,
        topk_ids: Tensor,
        router_logits: Tensor,
        roles: Tensor,
        *,
        step: Tensor | None = None,
        counters: Tensor | None = None,
        difference: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Route one step of an engine as fast as this policy can on its device, and count what that did.

        Args:
            topk_weights: As in `route`, and the next three; may be changed in place on a GPU, as routers return new tensors.
            topk_ids: Likewise.
            router_logits: As in `route`.
            roles: As in `route`.
            step: int64 `[3]` (`TokenRoles.step`). None: nothing is counted.
            counters: int64 `[len(COUNTERS)]`, added to. None: nothing is counted.
            difference: float32 `[>= num_tokens, num_experts]`, written: what each expert's weight has lost. None: not wanted.

        Returns:
            Weights and ids as in `route`, but they may be the arguments.
        """
        if self.fast is not None:
            return self.fast(topk_weights, topk_ids, router_logits, roles, step=step, counters=counters, difference=difference)
        routed = self._step(topk_weights, topk_ids, router_logits, roles)
        weights, ids, active = self._route(routed)
        if difference is not None:
            difference[: len(ids)] = difference_of(routed, weights, ids)
        if counters is not None and step is not None:
            count_step(counters, ids_before=routed.ids, ids_after=ids, roles=roles, step=step, active=active)
        return weights.to(topk_weights.dtype), ids.to(topk_ids.dtype)

    def _step(self, topk_weights: Tensor, topk_ids: Tensor, router_logits: Tensor, roles: Tensor) -> RoutedStep:
        scores = selection = None
        if self.rules.needs_scores and self.changes_routing:
            assert self.layer.scoring is not None
            scores, selection = self.layer.scoring.scores(router_logits)
        ids = (topk_ids.view(torch.int32) if topk_ids.dtype == torch.uint32 else topk_ids).long()
        return RoutedStep(
            weights=topk_weights, ids=ids, roles=roles, scores=scores, selection=selection, num_experts=self.layer.num_experts
        )

    def _route(self, step: RoutedStep) -> tuple[Tensor, Tensor, Tensor]:
        """New weights and ids, and which experts were voted for."""
        if not self.changes_routing or not len(step.ids):
            # Where nothing is re-routed, a kept slot is not critical: as if every slot voted.
            return step.weights, step.ids, step.per_expert(step.used & (step.roles != 0).unsqueeze(1))
        ballot = cast_votes(self.rules.votes, step, self._tables)
        moved = move(self.rules.targets, step, ballot, self.similarity)
        weights = weigh(self.weight_rule, step, moved, self._tables.get("folds"))
        return weights, moved.ids, ballot.active


def _simplest(rules: Rules, layer: LayerInfo) -> Rules:
    """The same rules, without reading scores where weights say as much: they rank alike unless there is a bias."""
    if rules.votes.order == "selection" and layer.scoring is not None and layer.scoring.bias is None:
        return replace(rules, votes=replace(rules.votes, order="weight"))
    return rules


def _refuse(policy: str, rules: Rules, layer: LayerInfo, known: Mapping[str, Tensor]) -> None:
    votes = rules.votes
    most = max(top_k for _, top_k in votes.steps())
    if votes.rule == "top" and most > layer.top_k:
        raise ConfigError(f"primary_top_k must be between 1 and the model's top_k ({layer.top_k}), got {most:g}")
    if votes.rule == "budget" and votes.budget > layer.num_experts:
        raise ConfigError(f"votes.budget must be at most the model's experts ({layer.num_experts}), got {votes.budget}")
    missing = [name for name in rules.tables() if name not in known]
    if missing:
        raise ConfigError(
            f"policy {policy!r} needs {missing[0]} of layer {layer.index}, which the artifact lacks: calibrate this model anew "
            "with `sere calibrate`, or choose a policy that does not need it"
        )
    if rules.needs_scores and layer.scoring is None:
        raise ConfigError(
            f"policy {policy!r} needs the router's scores of all experts, and the router of layer {layer.index} is of no kind "
            "that can be followed: use policy 'sere', which works from the selected experts alone"
        )
    if rules.weights == "router" and layer.renormalize is None:
        raise ConfigError(
            f"policy {policy!r} cannot tell whether the router of layer {layer.index} renormalises its weights: set weights to "
            "keep or renormalize, or use another policy"
        )
