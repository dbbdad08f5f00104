"""The hook at a layer's router: between its top-k and everything that uses it.

That is the capture of routed experts, the mapping of logical to physical experts (EPLB), and the experts. Where torch.compile
traces through the router (on the CPU) the hook is the custom op `sere::route`. Otherwise the layer is called directly: in eager
mode, and on a GPU, where the router runs inside vLLM's own opaque op, as Python at graph capture only.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sere.ops.engine.layer import ATTRIBUTE, is_traced, layer_of

_library = torch.library.Library("sere", "FRAGMENT")
_library.define("route(Tensor topk_weights, Tensor topk_ids, Tensor router_logits, str layer_name) -> (Tensor, Tensor)")

_Routing = Callable[..., tuple[Tensor, Tensor]]


def _route(topk_weights: Tensor, topk_ids: Tensor, router_logits: Tensor, layer_name: str) -> tuple[Tensor, Tensor]:
    weights, ids = layer_of(layer_name).route(topk_weights, topk_ids, router_logits)
    # A custom op must not return its arguments.
    return weights.clone() if weights is topk_weights else weights, ids.clone() if ids is topk_ids else ids


def _route_fake(topk_weights: Tensor, topk_ids: Tensor, router_logits: Tensor, layer_name: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(topk_weights), torch.empty_like(topk_ids)


_library.impl("route", _route, "CPU")
torch.library.register_fake("sere::route", _route_fake, lib=_library)


def follow(compute_routing: _Routing, runner: Any) -> _Routing:
    """A router's own function, followed by the policy of the layer that `runner` has at the time."""
    layer_name = runner.layer_name

    @functools.wraps(compute_routing)
    def routed(hidden_states: Tensor, router_logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        topk_weights, topk_ids = compute_routing(hidden_states, router_logits, *args, **kwargs)
        if is_traced():
            return torch.ops.sere.route(topk_weights, topk_ids, router_logits, layer_name)
        return getattr(runner, ATTRIBUTE).route(topk_weights, topk_ids, router_logits)

    followed: Any = routed
    followed.sere_original = compute_routing
    return followed


def follow_router(runner: Any) -> None:
    """Follow the router of a layer, once."""
    if not hasattr(runner.router._compute_routing, "sere_original"):
        runner.router._compute_routing = follow(runner.router._compute_routing, runner)


def own_routing(runner: Any) -> _Routing:
    """What the layer's router does without a policy."""
    return getattr(runner.router._compute_routing, "sere_original", runner.router._compute_routing)
