"""Launches of `route.cu`: any policy's step of one layer, whose settings are made once per layer."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import sere.ops.kernels.compile as kernels
from sere.ops.kernels.compile import require
from sere.ops.kernels.counting import COUNTERS
from sere.ops.kernels.launches import MAX_EXPERTS, MAX_TOP_K
from sere.ops.policies.scoring import Scoring
from sere.ops.reference_step import UNITS

MAX_GROUPS = 32
_WARP, _LANES_PER_SEARCH = 32, 8
# Above so many values of a step's difference, zeros are quicker written by torch than by the launch's one thread block.
_MOST_ZEROS = 1 << 17
# As route.cu and the headers it includes number them.
_VOTES = ("all", "top", "mass", "share", "benefit", "budget")
_SCORES = ("probability", "weight", "norm", "lynx")
_TARGETS = {"similar": 0, "random": 0, "least_loss": 0, "own": 1, "drop": 2, "drop_unvoted": 3}
_WEIGHTS = ("keep", "renormalize", "half", "fold")
_LOGITS = (torch.float32, torch.bfloat16, torch.float16)


class Routing:
    """A policy's rules and a layer's tables as `route.cu` takes them."""

    def __init__(
        self,
        rules: Any,
        *,
        weights: str,
        num_experts: int,
        scoring: Scoring | None,
        neighbours: Tensor | None,
        tables: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        """Put everything where the kernel reads it.

        Args:
            rules: `sere.conf.schema.rules.Rules`.
            weights: keep, renormalize, half or fold: `rules.weights`, or what `router` means here.
            num_experts: Experts of the layer, at most 1024.
            scoring: The router's; None only where `rules.needs_scores` is false.
            neighbours: int16 `[num_experts, n]` (`sorted_neighbours`) where targets are found by similarity.
            tables: The layer's, for those that `rules.tables()` lists.
            device: Where the layer runs.
        """
        votes = rules.votes
        self.num_experts, self.device = num_experts, device
        self._needs_logits = rules.needs_scores
        self._searches = neighbours is not None
        self._own = rules.targets.rule == "own"
        scoring = scoring or Scoring(function="softmax")
        grouped = scoring.groups_kept < scoring.num_groups
        ranks_by_scores = scoring.function == "sigmoid" or scoring.bias is not None
        steps = None
        if len(votes.by_batch) > 1:
            steps = torch.tensor(votes.by_batch, dtype=torch.float64, device=device)
        dial = {
            "all": 0.0,
            "top": float(votes.steps()[0][1]),
            "mass": votes.mass,
            "share": float(tables["beta"]) if votes.share is None and votes.rule == "share" else votes.share,
            "benefit": float(round(votes.benefit**3 * UNITS)),
            "budget": float(votes.budget),
        }[votes.rule]
        self._tables = (
            neighbours,
            tables["folds"].to(device, torch.float32).contiguous() if weights == "fold" else None,
        )
        self._vote_tables = (
            None if scoring.bias is None else scoring.bias.to(device, torch.float32).contiguous(),
            steps,
            tables["norms"].to(device, torch.float32).contiguous() if "norms" in rules.tables() else None,
            (tables["protected"] != 0).to(device, torch.int8).contiguous() if votes.protect else None,
        )
        self._votes = (
            _VOTES.index(votes.rule),
            int(votes.rule == "top" and votes.order == "selection"),
            0 if steps is None else len(steps),
            _SCORES.index(votes.score),
            int(votes.first or votes.rule == "benefit"),
            float(dial),
            float(votes.winner),
        )
        self._targets = (_TARGETS[rules.targets.rule], _WEIGHTS.index(weights))
        self._router = (
            int(scoring.function == "sigmoid"),
            int(ranks_by_scores or (grouped and scoring.group_score == "top2")),
            scoring.num_groups if grouped else 1,
            scoring.groups_kept if grouped else 1,
            int(scoring.group_score == "top2"),
        )
        self._experts_per_lane = min(size for size in (4, 8, 16, 32) if num_experts <= size * _WARP)

    def compile(self) -> None:
        """Compile for both types of ids: not in the middle of a graph's capture.

        Raises:
            ConfigError: if the kernel cannot be compiled.
        """
        for dtype in (torch.int32, torch.int64):
            self._kernel(dtype, self.device)

    def _kernel(self, dtype: torch.dtype, device: torch.device) -> Callable[..., None]:
        options = (f"-DEXPERTS_PER_LANE={self._experts_per_lane}", *(("-DTOPK_INT64",) if dtype == torch.int64 else ()))
        return kernels.compiled("route.cu", "sere_route", options, device.index or 0)

    def launch(
        self,
        topk_weights: Tensor,
        topk_ids: Tensor,
        router_logits: Tensor,
        roles: Tensor,
        *,
        step: Tensor | None = None,
        counters: Tensor | None = None,
        difference: Tensor | None = None,
    ) -> None:
        """Route one step of one layer in place, and count it: `route_reference` and `count_step` in one launch.

        Args:
            topk_weights: float32 `[num_tokens, top_k]`, contiguous, finite and not negative; changed.
            topk_ids: int32 or int64, same shape, contiguous; changed.
            router_logits: float32, bfloat16 or float16 `[num_tokens, num_experts]`, contiguous; any, where the rules need none.
            roles: int8 `[num_tokens]`.
            step: int64 `[3]` (`TokenRoles.step`). None: route whatever the roles say, and count nothing.
            counters: int64 `[len(COUNTERS)]`, added to. None: count nothing.
            difference: float32 `[>= num_tokens, num_experts]`, contiguous, of which the first rows are written: what each
                expert's weight has lost; zeros in rows that are not decode rows. None: not wanted.

        Raises:
            ValueError: if a tensor is not what the kernel reads.
            ConfigError: if the kernel cannot be compiled.
        """
        num_tokens, top_k = topk_ids.shape
        if not (1 <= self.num_experts <= MAX_EXPERTS and 1 <= top_k <= MAX_TOP_K):
            raise ValueError(
                f"the CUDA kernel takes at most {MAX_EXPERTS} experts and top_k {MAX_TOP_K}, got {self.num_experts} and {top_k}"
            )
        expected = [
            ("topk_weights", topk_weights, (torch.float32,), (num_tokens, top_k)),
            ("topk_ids", topk_ids, (torch.int32, torch.int64), (num_tokens, top_k)),
            ("router_logits", router_logits if self._needs_logits else None, _LOGITS, (num_tokens, self.num_experts)),
            ("roles", roles, (torch.int8,), (num_tokens,)),
            ("step", step, (torch.int64,), (3,)),
            ("counters", counters, (torch.int64,), (len(COUNTERS),)),
            ("difference", difference, (torch.float32,), (None, self.num_experts)),
        ]
        for name, tensor, dtypes, shape in expected:
            if tensor is not None:
                require(name, tensor, dtypes, shape, topk_ids.device)
        if difference is not None and len(difference) < num_tokens:
            raise ValueError(f"difference has {len(difference)} rows, the step {num_tokens}")
        if num_tokens == 0:
            return
        if num_tokens * max(top_k, self.num_experts) > torch.iinfo(torch.int32).max:
            raise ValueError(f"{num_tokens} rows are more than the CUDA kernel takes")

        writes_zeros = difference is not None and num_tokens * self.num_experts <= _MOST_ZEROS
        if difference is not None and not writes_zeros:
            difference[:num_tokens].zero_()
        lanes_per_row = _WARP if self._own else 1 << (top_k - 1).bit_length()
        wanted = max(num_tokens * lanes_per_row, self.num_experts * (_LANES_PER_SEARCH if self._searches else 1))
        most = 512 if self._experts_per_lane > 8 else 1024
        num_threads = min(most, math.ceil(wanted / _WARP) * _WARP)
        kernel = self._kernel(topk_ids.dtype, topk_ids.device)
        logits = router_logits if self._needs_logits else None
        neighbours = self._tables[0]
        width = 0 if neighbours is None else neighbours.shape[1]
        kernel(
            num_threads,
            (
                *(topk_weights, topk_ids, roles, step, counters, difference, *self._tables, logits, *self._vote_tables),
                *(num_tokens, top_k, self.num_experts, width, int(writes_zeros)),
                *self._votes,
                *self._targets,
                _LOGITS.index(router_logits.dtype) if self._needs_logits else 0,
                *self._router,
            ),
        )
