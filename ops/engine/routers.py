"""How a vLLM router makes scores of its logits: assumed from what it says of itself, then asked of it.

What a router is called, or what it says, decides nothing: one whose answers to random logits no assumption explains is not
followed, and policies that need scores are refused by name.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from sere.conf.errors import ConfigError
from sere.ops.policies.scoring import Scoring, reproduces

_NUM_ROWS = 64
_SPREADS = (0.5, 1.0, 2.0, 3.0)
_TOLERANCE = 1e-3
# The choice of these follows token ids, too.
_BY_TOKEN = ("_hash_indices_table", "bias_vl")


def ask_router(
    router: Any,
    compute_routing: Callable[..., tuple[Tensor, Tensor]],
    *,
    layer_name: str,
    num_experts: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Scoring:
    """How a layer's router scores, confirmed by its own answers. Its weights (the correction bias) must have been loaded.

    Args:
        router: vLLM's `FusedMoERouter`.
        compute_routing: Its own function, not followed by a policy: `(hidden_states, router_logits, indices_type)` to weights
            and ids `[num_tokens, top_k]`.
        layer_name: For the error.
        num_experts: The layer's logical experts.
        hidden_size: Of the layer's input.
        dtype: Likewise.
        device: Where the layer runs.

    Raises:
        ConfigError: if what the router answers is not the top-k of scores, weighted by them.
    """
    reason = "it chooses by token"
    if all(getattr(router, name, None) is None for name in _BY_TOKEN):
        logits, hidden_states = _drawn(num_experts, hidden_size, dtype, device)
        try:
            weights, ids = compute_routing(hidden_states, logits, None)
        except Exception as error:  # Whatever a custom function needs beside its arguments.
            reason = f"it cannot be asked: {type(error).__name__}: {error}"
        else:
            for scoring in assumptions(router, num_experts):
                if reproduces(scoring, logits, weights, ids) and _keeps_scale(scoring, logits, weights, ids):
                    return scoring
            reason = "its answer to random logits is not the best softmax or sigmoid scores, weighted by them"
    function = getattr(router, "custom_routing_function", None)
    name = type(router).__name__ + (f" with {getattr(function, '__qualname__', function)}" if function is not None else "")
    raise ConfigError(
        f"{layer_name} routes with {name}, whose scores of all experts cannot be known ({reason}): use policy sere, which "
        "works from ids alone"
    )


def assumptions(router: Any, num_experts: int) -> Iterator[Scoring]:
    """What a router may do, from likely to unlikely. A router may have attributes that it does not use."""
    said = getattr(router, "scoring_func", "softmax")
    functions: list[Literal["softmax", "sigmoid"]] = ["softmax", "sigmoid"]
    functions.sort(key=lambda function: function != said)
    bias = getattr(router, "e_score_correction_bias", None)
    biases = [None] if bias is None else [bias.detach().float(), None]
    groups = _groups(router, num_experts)
    for function in functions:
        for added in biases:
            for num_groups, groups_kept in groups:
                scores: list[Literal["max", "top2"]] = ["max"]
                if num_groups > 1 and num_experts >= 2 * num_groups:
                    scores = ["max", "top2"] if added is None else ["top2", "max"]
                for score in scores:
                    yield Scoring(
                        function=function, bias=added, num_groups=num_groups, groups_kept=groups_kept, group_score=score
                    )


def _groups(router: Any, num_experts: int) -> list[tuple[int, int]]:
    """Groups and how many are kept; the last entry is without groups."""
    num_groups, kept = (getattr(router, name, None) for name in ("num_expert_group", "topk_group"))
    if num_groups and kept and 1 < num_groups < num_experts and kept < num_groups and num_experts % num_groups == 0:
        return [(num_groups, kept), (1, 1)]
    return [(1, 1)]


def _drawn(num_experts: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits, flat ones and peaked ones, and inputs for them; the same in every engine."""
    generator = torch.Generator().manual_seed(0)
    spreads = torch.tensor(_SPREADS).repeat(_NUM_ROWS // len(_SPREADS)).unsqueeze(1)
    logits = torch.randn(_NUM_ROWS, num_experts, generator=generator) * spreads
    hidden_states = torch.randn(_NUM_ROWS, hidden_size, generator=generator)
    return logits.to(device), hidden_states.to(device, dtype)


def _keeps_scale(scoring: Scoring, logits: Tensor, weights: Tensor, ids: Tensor) -> bool:
    """Whether weights are scores times one factor for all rows, or have one sum in all rows.

    Within rows weights may be in proportion by chance: with one expert per row they always are.
    """
    scores, _ = scoring.scores(logits)
    totals = weights.double().sum(1)
    ratios = totals / scores.gather(1, ids.long()).double().sum(1)
    return any(bool((values.amax() - values.amin()) <= _TOLERANCE * values.amax()) for values in (totals, ratios))
