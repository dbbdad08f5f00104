"""What every policy does in one decode step of one layer, in plain Python: the contract that all other implementations follow.

Written to be read, not to be fast; the rules themselves are in `reference_step.py`. A policy is votes x targets x weights x
compensation (`sere.conf.schema.rules`).

Rows are tokens, slots a row's `top_k` choices. For a row: w its routing weights, W their sum; p its scores over all experts;
sel what its router ranks by. A is the step's active set. A negative id marks an unused slot: it has no rank and no vote, and
passes through. Sums over a row are taken in float64; sums over rows in units of 2^-32, so that no order of adding matters.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from sere.conf.schema import RerouteConfig
from sere.ops.reference_step import DECODE, PADDING, PREFILL, Step, vote, weigh

__all__ = ["DECODE", "PADDING", "PREFILL", "compensate_reference", "reroute_reference", "route_reference"]


def reroute_reference(
    topk_weights: Tensor,
    topk_ids: Tensor,
    similarity: Tensor,
    *,
    primary_top_k: int,
    threshold: float,
    roles: Tensor | None = None,
) -> Tensor:
    """Re-route the secondary experts of one decode step of one layer (SERE, arXiv 2602.07616, section 3).

    1. Every decode row votes for the experts of its `primary_top_k` highest-weighted slots (equal weights: the lowest slot
       ranks first), every prefill row for all its experts, padding rows for none. The experts voted for are *primary*.
    2. Every other slot of a decode row whose expert is not primary goes to the primary expert most similar to it (equal
       similarities: the lowest expert id), if that similarity is at least `threshold`.
    3. Otherwise the slot keeps its expert, which is then *critical*. Prefill and padding rows never change.

    A negative id marks an unused slot: it has no rank and no vote, and passes through. Weights are not changed.

    Args:
        topk_weights: Routing weights, float `[num_tokens, top_k]`, finite, in any order within a row.
        topk_ids: Expert ids, int32 or int64 `[num_tokens, top_k]`, below num_experts.
        similarity: float32 `[num_experts, num_experts]`; row: the expert replaced, column: its replacement.
        primary_top_k: Slots per decode row that vote (the paper's S), at least 1.
        threshold: Least similarity that re-routes (the paper's rho), compared as float32.
        roles: int8 `[num_tokens]`: 0 padding, 1 prefill, 2 decode. None: all decode.

    Returns:
        New ids, of the shape and dtype of `topk_ids`.
    """
    step = Step(topk_weights, topk_ids, roles)
    step.vote_for(lambda row: step.ranked(row)[:primary_top_k])
    step.move_to_similar(similarity, threshold)
    return step.result()[1]


def route_reference(
    reroute: RerouteConfig,
    topk_weights: Tensor,
    topk_ids: Tensor,
    scores: Tensor,
    *,
    selection: Tensor | None = None,
    tables: Mapping[str, Tensor] | None = None,
    roles: Tensor | None = None,
    layer: int = 0,
    renormalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """Apply any policy to one decode step of one layer.

    Args:
        reroute: The settings.
        topk_weights: Routing weights, float32 `[num_tokens, top_k]`, finite, in any order within a row.
        topk_ids: Expert ids, int32 or int64, same shape.
        scores: The router's scores (softmax or sigmoid, without bias), float32 `[num_tokens, num_experts]`.
        selection: What the router ranks by: scores plus bias, minus infinity outside a row's groups. None: `scores`.
        tables: The layer's similarities, norms and so on by name: those that `reroute.rules(layer).tables()` lists.
        roles: int8 `[num_tokens]`: 0 padding, 1 prefill, 2 decode. None: all decode.
        layer: The layer's index, which settings and random choices may depend on.
        renormalize: Whether the model's router renormalises its weights, for weights `router`.

    Returns:
        New weights and ids, of the shapes and dtypes of the old ones.

    Raises:
        ValueError: if a table is missing.
    """
    from sere.ops.policies.targets import random_similarity

    rules, known = reroute.rules(layer), dict(tables or {})
    missing = [name for name in rules.tables() if name not in known]
    if missing:
        raise ValueError(f"policy {reroute.policy!r} needs the tables {', '.join(missing)}")
    step = Step(topk_weights, topk_ids, roles)
    ranks = scores if selection is None else selection
    vote(step, rules.votes, scores, ranks, known)
    match rules.targets.rule:
        case "similar" if rules.votes.rule != "all":
            step.move_to_similar(known[rules.targets.metric], rules.targets.threshold)
        case "random":
            step.move_to_similar(random_similarity(rules.targets.seed, layer, scores.shape[1]), 0.0)
        case "least_loss":
            step.move_to_similar(1 - known["fold_losses"], 0.0)
        case "own":
            step.move_to_own(scores, ranks)
        case "drop":
            step.drop(unvoted=False)
        case "drop_unvoted":
            step.drop(unvoted=True)
    weigh(step, rules, known, renormalize)
    return step.result()


def compensate_reference(
    reroute: RerouteConfig,
    hidden_states: Tensor,
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    tables: Mapping[str, Tensor],
    *,
    roles: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """What is added to the routed experts' output, in the units of the routing weights: the estimated outputs of the experts,
    times what each one's weight has lost. With D = w - v, dense over experts: D mu, or D (mu_r + U_r V_r x).

    Args:
        reroute: The settings.
        hidden_states: The experts' input x, `[num_tokens, hidden_size]`.
        before: Weights and ids as the router made them, `[num_tokens, top_k]` each.
        after: As the policy made them.
        tables: means, or surrogate_in and surrogate_out `[num_experts * R, hidden_size]`, an expert's R rows together, and
            surrogate_means `[R, num_experts, hidden_size]`, of which rank r has number r - 1.
        roles: As in `route_reference`: only decode rows get anything.
        layer: As in `route_reference`.

    Returns:
        float64 `[num_tokens, hidden_size]`.
    """
    compensation = reroute.rules(layer).compensation
    added = torch.zeros(hidden_states.shape, dtype=torch.float64)
    if compensation.rule == "none":
        return added
    rank = compensation.rank
    means = (tables["means"] if rank == 0 else tables["surrogate_means"][rank - 1]).double()
    for row, x in enumerate(hidden_states.double()):
        if roles is not None and roles[row] != DECODE:
            continue
        for sign, (weights, ids) in ((1, before), (-1, after)):
            for weight, expert in zip(weights[row].tolist(), ids[row].tolist(), strict=True):
                if expert < 0:
                    continue
                estimate = means[expert]
                stored = len(tables["surrogate_in"]) // len(means) if rank else 0
                for place in range(expert * stored, expert * stored + rank):
                    projection = tables["surrogate_in"][place].double() @ x
                    estimate = estimate + projection * tables["surrogate_out"][place].double()
                added[row] += sign * weight * estimate
    return added
