"""What the compiled CPU path is told: a policy's rules and a layer's tables once, the tensors of a step at each call.

`cpu_sources/step.h` declares the same two structures.
"""

import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sere.conf.schema.rules import Rules
from sere.ops.reference_step import UNITS

MAX_TOP_K = 64
"""A row's slots are the bits of one word."""
_MAX_STEPS = 8
_VOTES = ("all", "top", "mass", "share", "benefit", "budget")
_SCORES = ("probability", "weight", "norm", "lynx")
_TARGETS = {"similar": 0, "random": 0, "least_loss": 0, "own": 1, "drop": 2, "drop_unvoted": 3}
_WEIGHTS = ("keep", "renormalize", "half", "fold")
_PLAN = struct.Struct(f"=4q2d4qdq{_MAX_STEPS}q{_MAX_STEPS}d3q4q5q")
CALL = struct.Struct("=7q9q")
SIZES = _PLAN.size * 4096 + CALL.size
"""What the library's `sere_sizes` returns."""


class Plan:
    """A policy in one layer, as the library reads it. Keeps its tables alive."""

    def __init__(
        self,
        rules: Rules,
        *,
        num_experts: int,
        weights: str,
        scoring: Any = None,
        neighbours: Tensor | None = None,
        tables: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Lay out the rules.

        Args:
            rules: The policy's.
            num_experts: The layer's.
            weights: The weight rule; not `router`.
            scoring: The router's `Scoring`; None where the rules need no scores.
            neighbours: int16 `[num_experts, n]`, of `sorted_neighbours`, for targets that look for the most similar expert.
            tables: The layer's tables by name, those that the rules list.
        """
        votes, steps, known = rules.votes, rules.votes.steps(), dict(tables or {})
        share = votes.share if votes.share is not None or votes.rule != "share" else float(known["beta"])
        self._tensors = (
            neighbours,
            _as(known.get("folds"), torch.float32) if weights == "fold" else None,
            _as(known.get("norms"), torch.float32),
            _as(getattr(scoring, "bias", None), torch.float32),
            _as(known.get("protected"), torch.uint8) if votes.protect else None,
        )
        filled = [0] * (_MAX_STEPS - len(steps))
        packed = _PLAN.pack(
            num_experts,
            _VOTES.index(votes.rule),
            votes.protect,
            votes.order == "selection",
            votes.mass,
            share or 0.0,
            round(votes.benefit**3 * UNITS),
            votes.budget,
            _SCORES.index(votes.score),
            votes.first,
            votes.winner,
            len(steps),
            *(least for least, _ in steps),
            *filled,
            *(top_k for _, top_k in steps),
            *filled,
            _TARGETS[rules.targets.rule],
            _WEIGHTS.index(weights),
            0 if neighbours is None else neighbours.shape[1],
            scoring is not None and scoring.function == "sigmoid",
            1 if scoring is None else scoring.num_groups,
            1 if scoring is None else scoring.groups_kept,
            scoring is not None and scoring.group_score == "top2",
            *(0 if tensor is None else tensor.data_ptr() for tensor in self._tensors),
        )
        # A tensor holds it at one address for as long as the plan lives.
        self._storage = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        self.address = self._storage.data_ptr()


def _as(table: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if table is None else table.detach().to(device="cpu", dtype=dtype).contiguous()
