"""What a GPU runs of a policy: which launch it is, and the comparison of all kernels with the reference at engine start.

A launch allocates nothing, waits for nothing, and reads nothing that changes from step to step on the host, so it can be
recorded in a CUDA graph; compile and launch once before that (`warm_up`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sere.conf.errors import ConfigError
from sere.conf.schema.rules import Rules
from sere.ops.kernels.launches import MAX_EXPERTS, MAX_TOP_K, fill_roles, reroute
from sere.ops.kernels.neighbours import neighbours_of, sorted_neighbours
from sere.ops.kernels.routing import MAX_GROUPS, Routing
from sere.ops.policies.scoring import Scoring
from sere.ops.reference import DECODE, PADDING, PREFILL, reroute_reference, route_reference

__all__ = ["MAX_EXPERTS", "MAX_TOP_K", "LaunchedStep", "fill_roles", "launched_step", "reroute", "warm_up"]


class LaunchedStep:
    """A policy's whole step in one launch, counters included: of `reroute.cu` for SERE, which moves ids only, and for policies
    that do nothing but count, else of `route.cu`."""

    def __init__(self, num_experts: int, primary_top_k: int | None, neighbours: Tensor | None, routing: Routing | None) -> None:
        """Keep what the launches need.

        Args:
            num_experts: Experts of the layer.
            primary_top_k: S of SERE, top_k where nothing is re-routed; None for policies that do more.
            neighbours: SERE's; None where nothing is re-routed.
            routing: The policy for `route.cu`, which also gives `difference`; None where nothing is re-routed.
        """
        self._num_experts, self._primary_top_k = num_experts, primary_top_k
        self._neighbours, self._routing = neighbours, routing

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
    ) -> tuple[Tensor, Tensor]:
        if topk_ids.dtype == torch.uint32:
            topk_ids = topk_ids.view(torch.int32)
        ids = topk_ids.contiguous()
        weights = topk_weights.float().contiguous()
        if counters is None or step is None:
            counters = None
        if self._routing is not None and (difference is not None or self._primary_top_k is None):
            logits = router_logits if router_logits.is_floating_point() else router_logits.float()
            logits = (logits.float() if logits.dtype == torch.float64 else logits).contiguous()
            self._routing.launch(weights, ids, logits, roles, step=step, counters=counters, difference=difference)
            return weights.to(topk_weights.dtype), ids
        assert self._primary_top_k is not None
        if difference is not None:
            difference[: len(ids)].zero_()
        reroute(
            weights,
            ids,
            self._neighbours,
            num_experts=self._num_experts,
            primary_top_k=self._primary_top_k,
            new_ids=ids,
            roles=roles,
            step=step,
            counters=counters,
        )
        return topk_weights, ids


def launched_step(rules: Rules, layer: Any, similarity: Tensor | None, tables: Mapping[str, Tensor]) -> LaunchedStep | None:
    """The kernel for a policy.

    Args:
        rules: The policy.
        layer: `sere.ops.policies.policy.LayerInfo`.
        similarity: float32 `[num_experts, num_experts]` on the layer's device, for targets that are found by it.
        tables: The layer's tables by name, those that `rules.tables()` lists.

    Returns:
        None for the few rules that torch's operations do: groups of experts that the kernel does not hold.

    Raises:
        ConfigError: if the layer is too large, or the kernel cannot be compiled.
    """
    num_experts, top_k, votes, scoring = layer.num_experts, layer.top_k, rules.votes, layer.scoring
    if num_experts > MAX_EXPERTS or top_k > MAX_TOP_K:
        raise ConfigError(
            f"layer {layer.index} has {num_experts} experts and top_k {top_k}, the CUDA kernel takes at most "
            f"{MAX_EXPERTS} and {MAX_TOP_K}: remove `sere` from additional_config"
        )
    if not rules.changes_routing(top_k):
        return LaunchedStep(num_experts, top_k, None, None)
    if rules.needs_scores and (scoring is None or scoring.num_groups > MAX_GROUPS or num_experts % scoring.num_groups):
        return None
    neighbours = None
    if similarity is not None:
        neighbours = neighbours_of(similarity, rules.targets.least_similarity)
    weights = rules.weights_where(layer.renormalize)
    routing = Routing(
        rules,
        weights=weights,
        num_experts=num_experts,
        scoring=scoring,
        neighbours=neighbours,
        tables=tables,
        device=layer.device,
    )
    (_, first), is_sere = votes.steps()[0], votes.rule == "top" and votes.order == "weight" and not votes.protect
    is_sere &= len(votes.steps()) == 1 and first % 1 == 0 and weights == "keep" and neighbours is not None
    if not is_sere or rules.compensation.rule != "none":
        routing.compile()
    return LaunchedStep(num_experts, int(first) if is_sere else None, neighbours, routing)


def warm_up(device: torch.device) -> None:
    """Compile every kernel for `device`, launch each once and compare with the reference. Before any graph capture.

    Raises:
        ConfigError: if a kernel cannot be compiled.
        RuntimeError: if a kernel is wrong on this device.
    """
    # vLLM loads models under another default device, and another default type (named below).
    with torch.device("cpu"):
        right = _agrees_with_reference(device)
    if not right:
        raise RuntimeError(
            f"the re-routing kernels give wrong results on {torch.cuda.get_device_name(device)}: run tests/gpu and report this"
        )


def _agrees_with_reference(device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    num_tokens, num_experts, top_k = 24, 60, 6
    similarity = torch.rand(num_experts, num_experts, generator=generator, dtype=torch.float32)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float32)
    scoring = Scoring(function="sigmoid", bias=torch.rand(num_experts, generator=generator, dtype=torch.float32))
    scores, selection = scoring.scores(logits)
    ids = selection.topk(top_k).indices
    weights = scores.gather(1, ids)
    starts = torch.tensor([0, 5, *range(6, 22)], dtype=torch.int32)
    expected_roles = torch.tensor([PREFILL] * 5 + [DECODE] * 16 + [PADDING] * 3, dtype=torch.int8)
    roles = torch.zeros(num_tokens, dtype=torch.int8, device=device)
    step = torch.zeros(3, dtype=torch.int64, device=device)
    fill_roles(starts.to(device), roles, step, decode_length=1, min_tokens=1, max_tokens=1024)
    neighbours = sorted_neighbours(similarity, 0.5).to(device)
    right = torch.equal(roles.cpu(), expected_roles)
    own = _own_targets()
    routing = Routing(
        own.rules(0),
        weights="renormalize",
        num_experts=num_experts,
        scoring=scoring,
        neighbours=None,
        tables={},
        device=device,
    )
    for dtype in (torch.int32, torch.int64):
        new_ids = ids.to(device, dtype, copy=True)
        reroute(
            weights.to(device),
            new_ids,
            neighbours,
            num_experts=num_experts,
            primary_top_k=2,
            new_ids=new_ids,
            roles=roles,
            step=step,
        )
        expected = reroute_reference(weights, ids, similarity, primary_top_k=2, threshold=0.5, roles=expected_roles)
        right &= torch.equal(new_ids.cpu().long(), expected)

        own_ids, own_weights = ids.to(device, dtype, copy=True), weights.to(device, copy=True)
        routing.launch(own_weights, own_ids, logits.to(device), roles, step=step)
        expected_weights, expected_ids = route_reference(own, weights, ids, scores, selection=selection, roles=expected_roles)
        right &= torch.equal(own_ids.cpu().long(), expected_ids)
        right &= torch.allclose(own_weights.cpu(), expected_weights, rtol=1e-5, atol=0)
    return right


def _own_targets() -> Any:
    from sere.conf.schema import RerouteConfig

    return RerouteConfig(policy="oea", primary_top_k=2)
