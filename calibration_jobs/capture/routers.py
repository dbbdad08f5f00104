"""What a Transformers model's routers say of all experts, not only of those they choose; no per-architecture code.

A router is the module beside the experts that has one row of weights per expert; its first output of one number per expert is
its logits. How scores are made of them is found by trying: what reproduces the router's own choice is it.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sere.ops.policies.scoring import Scoring, reproduces


class Router:
    """The router of one layer: its logits of the latest forward pass, and how it makes scores of logits."""

    def __init__(self, module: nn.Module, parent: nn.Module, num_experts: int, config: Any) -> None:
        """Nothing is observed yet.

        Args:
            module: The router.
            parent: What it is part of, beside the experts: some families keep the bias there.
            num_experts: Of its layer.
            config: The model's text configuration, which knows of groups of experts.
        """
        self.module = module
        # Weakly: it holds the experts, by which routers are kept.
        self._parent = weakref.ref(parent)
        self._num_experts, self._config = num_experts, config
        self.logits: Tensor | None = None
        """Float `[num_tokens, num_experts]`; None before the first pass, or where the router does not tell."""
        self._scoring: Scoring | None = None
        self._is_tried = False

    def observe(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """A forward hook of the router."""
        # On its way out, when weights that live on disk are still what the output was computed from.
        parts = output if isinstance(output, tuple) else (output,)
        dense = (part for part in parts if torch.is_tensor(part) and part.is_floating_point())
        self.logits = next((part.reshape(-1, self._num_experts) for part in dense if part.shape[-1] == self._num_experts), None)

    def scoring(self, topk_weights: Tensor, topk_ids: Tensor) -> Scoring | None:
        """How this router makes scores, found from the latest pass; None if no known way reproduces its choice."""
        if not self._is_tried and self.logits is not None:
            found = (
                scoring
                for scoring in self._candidates()
                if _reproduces(scoring, self.logits, topk_weights.reshape(-1, topk_ids.shape[-1]), topk_ids)
            )
            self._scoring, self._is_tried = next(found, None), True
        return self._scoring

    def _candidates(self) -> Iterator[Scoring]:
        parent = self._parent()
        assert parent is not None
        tensors = [
            *self.module.named_parameters(),
            *self.module.named_buffers(),
            *parent.named_parameters(recurse=False),
            *parent.named_buffers(recurse=False),
        ]
        # A linear layer's own bias is part of the logits already.
        biases = [
            tensor.detach().float().reshape(-1)
            for name, tensor in tensors
            if name.rpartition(".")[2] != "bias" and tensor.numel() == self._num_experts and not tensor.is_meta
        ]
        groups = getattr(self._config, "n_group", None) or 1
        kept = getattr(self._config, "topk_group", None) or 1
        for function in ("softmax", "sigmoid"):
            for bias in (*biases, None):
                yield Scoring(function=function, bias=bias)
                if groups > kept:
                    for score in ("top2", "max"):
                        yield Scoring(
                            function=function,
                            bias=bias,
                            num_groups=groups,
                            groups_kept=kept,
                            group_score=score,
                        )


def _reproduces(scoring: Scoring, logits: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> bool:
    """`reproduces`, also of weights that a model of a narrow type has rounded to it."""
    if topk_weights.dtype.itemsize >= 4:
        return reproduces(scoring, logits, topk_weights, topk_ids)
    expected = scoring.scores(logits)[0].gather(1, topk_ids.long())
    expected *= topk_weights.float().sum(1, keepdim=True) / expected.sum(1, keepdim=True).clamp(min=1e-30)
    # Each weight is rounded, and so is their sum.
    slack = 2 * torch.finfo(topk_weights.dtype).eps * topk_weights.float().amax(1, keepdim=True)
    is_near = bool(((expected - topk_weights.float()).abs() <= slack).all())
    return is_near and reproduces(scoring, logits, expected, topk_ids)


_routers: "weakref.WeakKeyDictionary[nn.Module, Router]" = weakref.WeakKeyDictionary()
"""By experts module: what was found of a router is kept for later passes."""


def router_of(model: nn.Module, experts: nn.Module, num_experts: int) -> Router | None:
    """The router beside an experts module; None if there is none that can be told."""
    if experts not in _routers:
        parent = next((module for module in model.modules() if experts in module.children()), None)
        beside = parent.children() if parent is not None else ()
        found = next((module for module in beside if module is not experts and _has_row_per_expert(module, num_experts)), None)
        if found is None:
            return None
        assert parent is not None
        _routers[experts] = Router(found, parent, num_experts, model.config.get_text_config())  # type: ignore[operator, union-attr]
    return _routers[experts]


def _has_row_per_expert(module: nn.Module, num_experts: int) -> bool:
    return any(parameter.ndim == 2 and parameter.shape[0] == num_experts for parameter in module.parameters())
