"""Re-routing on the CPU: a whole step of one layer in one call of compiled code, and the public op.

Where there is no compiler, torch's operations do both; the op's have shapes that depend on the data: not for a GPU, which would
be waited for.
"""

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sere.conf.schema.rules import Rules, Targets, Votes
from sere.ops.kernels.counting import COUNTERS
from sere.ops.kernels.cpu_library import library
from sere.ops.kernels.cpu_plan import CALL, MAX_TOP_K, Plan
from sere.ops.kernels.neighbours import neighbours_of, sorted_neighbours
from sere.ops.kernels.votes import primary_experts, voting_slots
from sere.ops.reference import DECODE

if TYPE_CHECKING:
    from sere.ops.policies.policy import LayerInfo

_WIDE = {torch.int32: 0, torch.uint32: 0, torch.int64: 1}
_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
_LOGITS = (torch.float32, torch.bfloat16)
_BAD_ID = 2
_INT64 = ctypes.c_int64


class CompiledStep:
    """One layer's steps: a `FastStep` of ops/policies/policy.py. Threads may share it: a call leaves nothing behind."""

    def __init__(
        self,
        run: Any,
        plan: Plan,
        *,
        num_experts: int,
        changes_routing: bool = True,
        changes_weights: bool = True,
        reads_logits: bool = False,
    ) -> None:
        """Make the steps of a layer.

        Args:
            run: The library's `sere_step`.
            plan: Rules and tables.
            num_experts: The layer's.
            changes_routing: False where steps are only counted.
            changes_weights: False where new slots always keep the old ones' weights.
            reads_logits: Whether the rules need the router's scores.
        """
        self._run = run
        self._plan, self._address = plan, plan.address
        self._num_experts = num_experts
        self._changes_routing, self._changes_weights = changes_routing, changes_weights
        self._reads_logits = reads_logits
        # Where the counters lie that were found to be as they must: an engine's stay where they are.
        self._known_counters = 0

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
        """`Policy.route_and_count`.

        Raises:
            ValueError: if an id is not below num_experts, or what is written to is no such tensor.
        """
        changes, step_at, counters_at = self._changes_routing, 0, 0
        if step is not None:
            step_at = step.data_ptr()
            # Saves making tensors in vain; whether there is anything to count is looked up in there.
            changes = changes and _INT64.from_address(step_at + 16).value != 0
            if counters is not None:
                counters_at = counters.data_ptr()
                if counters_at != self._known_counters:
                    _check_counters(counters)
                    self._known_counters = counters_at
        if not (changes or counters_at or difference is not None):
            return topk_weights, topk_ids
        num_tokens, top_k = topk_ids.shape
        weights, ids = topk_weights, topk_ids
        wide = _WIDE.get(ids.dtype)
        if wide is None or weights.dtype not in _WEIGHTS or top_k > MAX_TOP_K:
            raise ValueError(
                f"ids must be int32, int64 or uint32 and weights float32 [num_tokens, at most {MAX_TOP_K}], got "
                f"{ids.dtype}, {weights.dtype} {list(ids.shape)}"
            )
        if roles.dtype is not torch.int8 or roles.numel() != num_tokens:
            raise ValueError(f"roles must be int8 [{num_tokens}], got {roles.dtype} {list(roles.shape)}")
        if weights.dtype is not torch.float32:
            weights = weights.float()
        if not (weights.is_contiguous() and ids.is_contiguous() and roles.is_contiguous()):
            weights, ids, roles = weights.contiguous(), ids.contiguous(), roles.contiguous()
        logits_at = stride = bfloat16 = 0
        if changes and self._reads_logits:
            router_logits = self._readable(router_logits, num_tokens)
            logits_at, stride = router_logits.data_ptr(), router_logits.stride(0)
            bfloat16 = router_logits.dtype is torch.bfloat16
        difference_at = difference_stride = 0
        if difference is not None:
            _check_difference(difference, num_tokens, self._num_experts)
            difference_at, difference_stride = difference.data_ptr(), difference.stride(0)
        new_ids = torch.empty_like(ids) if changes else None
        new_weights = torch.empty_like(weights) if changes and self._changes_weights else None
        outcome = self._run(
            CALL.pack(
                self._address,
                num_tokens,
                top_k,
                wide,
                bfloat16,
                stride,
                difference_stride,
                weights.data_ptr(),
                ids.data_ptr(),
                logits_at,
                roles.data_ptr(),
                step_at,
                counters_at,
                difference_at,
                0 if new_weights is None else new_weights.data_ptr(),
                0 if new_ids is None else new_ids.data_ptr(),
            )
        )
        if outcome == _BAD_ID:
            raise ValueError(f"topk_ids must be below num_experts, {self._num_experts}, got {int(topk_ids.max())}")
        if outcome == 0 or new_ids is None:
            return topk_weights, topk_ids
        if new_weights is None:
            return topk_weights, new_ids
        return new_weights if new_weights.dtype == topk_weights.dtype else new_weights.to(topk_weights.dtype), new_ids

    def _readable(self, router_logits: Tensor, num_tokens: int) -> Tensor:
        if router_logits.dtype not in _LOGITS:
            router_logits = router_logits.float()
        if router_logits.shape != (num_tokens, self._num_experts):
            raise ValueError(f"router_logits must be [{num_tokens}, {self._num_experts}], got {list(router_logits.shape)}")
        return router_logits if router_logits.stride(1) == 1 else router_logits.contiguous()


def _check_counters(counters: Tensor) -> None:
    if counters.dtype != torch.int64 or not counters.is_contiguous() or counters.numel() != len(COUNTERS):
        raise ValueError(
            f"counters must be contiguous int64 [{len(COUNTERS)}], got {counters.dtype} {list(counters.shape)} with strides "
            f"{counters.stride()}"
        )


def _check_difference(difference: Tensor, num_tokens: int, num_experts: int) -> None:
    rows, columns = difference.shape
    if difference.dtype != torch.float32 or difference.stride(1) != 1 or rows < num_tokens or columns != num_experts:
        raise ValueError(
            f"difference must be float32 [at least {num_tokens}, {num_experts}] with neighbouring columns, got "
            f"{difference.dtype} {list(difference.shape)} with strides {difference.stride()}"
        )


def compiled_step(
    rules: Rules, layer: "LayerInfo", similarity: Tensor | None, tables: Mapping[str, Tensor]
) -> CompiledStep | None:
    """A policy's steps of one layer in compiled code.

    Args:
        rules: The policy's.
        layer: The layer.
        similarity: What a replacement is found by, float32 `[num_experts, num_experts]`; None for other targets.
        tables: The layer's tables by name, those that the rules list.

    Returns:
        None where torch's operations have to do it: no compiler, or more than 64 slots a row.
    """
    if layer.top_k > MAX_TOP_K or layer.num_experts > torch.iinfo(torch.int16).max or (found := library()) is None:
        return None
    weights, changes = rules.weights_where(layer.renormalize), rules.changes_routing(layer.top_k)
    by_similarity = rules.targets.rule in ("similar", "random", "least_loss")
    neighbours = None
    if changes and by_similarity:
        assert similarity is not None
        neighbours = sorted_neighbours(similarity, rules.targets.least_similarity)
    plan = Plan(
        rules,
        num_experts=layer.num_experts,
        weights=weights,
        scoring=layer.scoring,
        neighbours=neighbours,
        tables=tables,
    )
    return CompiledStep(
        found.sere_step,
        plan,
        num_experts=layer.num_experts,
        changes_routing=changes,
        changes_weights=weights != "keep" or not by_similarity,
        reads_logits=rules.needs_scores,
    )


def reroute(
    topk_weights: Tensor,
    topk_ids: Tensor,
    similarity: Tensor,
    *,
    primary_top_k: int,
    threshold: float,
    roles: Tensor | None,
) -> Tensor:
    """Re-route one step of one layer; arguments and result are those of `reroute_reference`."""
    if topk_ids.numel() == 0 or primary_top_k >= topk_ids.shape[1]:
        return topk_ids.clone()
    num_experts = similarity.shape[0]
    fits = topk_ids.shape[1] <= MAX_TOP_K and num_experts <= torch.iinfo(torch.int16).max
    # Of an inference tensor it cannot be known whether it changed since its neighbours were sorted.
    if fits and topk_weights.dtype != torch.float64 and not similarity.is_inference() and (found := library()) is not None:
        rules = Rules(votes=Votes(primary_top_k=primary_top_k), targets=Targets(threshold=threshold))
        plan = Plan(rules, num_experts=num_experts, weights="keep", neighbours=neighbours_of(similarity, threshold))
        run = CompiledStep(found.sere_step, plan, num_experts=num_experts, changes_weights=False)
        if roles is None:
            roles = torch.full(topk_ids.shape[:1], DECODE, dtype=torch.int8)
        _, new_ids = run(topk_weights, topk_ids, topk_weights, roles, step=None, counters=None, difference=None)
        return new_ids.clone() if new_ids is topk_ids else new_ids
    return reroute_in_torch(topk_weights, topk_ids, similarity, primary_top_k=primary_top_k, threshold=threshold, roles=roles)


def reroute_in_torch(
    topk_weights: Tensor,
    topk_ids: Tensor,
    similarity: Tensor,
    *,
    primary_top_k: int,
    threshold: float,
    roles: Tensor | None,
) -> Tensor:
    """`reroute` where there is no compiled code."""
    num_experts = similarity.shape[0]
    votes = voting_slots(topk_weights, topk_ids, primary_top_k, roles)
    primary = primary_experts(topk_ids, votes, num_experts)
    # Only the primary experts' columns are searched; they ascend, and argmax takes the first, lowest, of equals.
    candidates = primary.nonzero().squeeze(1)
    if candidates.numel() in (0, num_experts):
        return topk_ids.clone()
    best, column = similarity.index_select(1, candidates).max(dim=1)
    reroutes = (best >= threshold).logical_and_(~primary)
    table = torch.where(reroutes, candidates[column], torch.arange(num_experts)).to(topk_ids.dtype)
    rerouted = table[topk_ids.clamp(min=0).flatten().long()].view_as(topk_ids)
    # A slot that voted has a primary expert, which the table maps to itself.
    changeable = topk_ids >= 0
    if roles is not None:
        changeable.logical_and_((roles == DECODE).unsqueeze(1))
    return torch.where(changeable, rerouted, topk_ids)
