"""The nouns of the tables: sums of one layer that blocks of tokens and shards add to, and what becomes of them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sere.calibration_jobs.capture.experts import TokenBlock


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """What a table's sums depend on beside the tokens."""

    num_experts: int
    rank: int
    """Highest rank of surrogates."""
    input_directions: Tensor | None = None
    """Orthonormal directions on which surrogates see inputs, float32 `[num_directions, hidden_size]`; None: as they are."""
    output_directions: Tensor | None = None
    """Likewise of each expert's outputs, `[num_experts, num_directions, hidden_size]`: experts write into directions of their
    own, which the leading ones of all their outputs together miss."""


def table_specs(num_experts: Mapping[int, int], rank: int, directions: Mapping[str, Tensor] | None) -> dict[int, TableSpec]:
    """Each layer's, from its number of experts and what `CalibrationWorker.directions` found (None: nothing is projected)."""
    known = directions or {}
    return {
        layer: TableSpec(
            num_experts=number,
            rank=rank,
            input_directions=known.get(f"{layer}.hidden_states"),
            output_directions=known.get(f"{layer}.outputs"),
        )
        for layer, number in num_experts.items()
    }


class TableSums(ABC):
    """Sums of one kind over tokens of one layer; blocks and shards can be added anywhere and in any order."""

    def __init__(self, spec: TableSpec, sums: Mapping[str, Tensor] | None = None) -> None:
        """Nothing is summed yet, or what a shard has summed.

        Args:
            spec: Of the layer.
            sums: What `sums` of another instance held.
        """
        self.spec = spec
        self.sums: dict[str, Tensor] = dict(sums or {})

    def add(self, name: str, value: Tensor) -> None:
        """Add to one sum; in float64, on the CPU."""
        value = value.double().cpu()
        self.sums[name] = value if name not in self.sums else self.join(name, self.sums[name], value)

    def join(self, name: str, first: Tensor, second: Tensor) -> Tensor:
        """How two shards' values of a sum become one."""
        return first + second

    def merge(self, other: "TableSums") -> None:
        """Add the sums of another shard."""
        for name, value in other.sums.items():
            self.add(name, value)

    @abstractmethod
    def update(self, block: TokenBlock) -> None:
        """Add a block of tokens."""

    @abstractmethod
    def finalize(self) -> dict[str, Tensor]:
        """The tables, by the names and in the types of `sere.ops.similarity`."""


def routed(block: TokenBlock, num_experts: int) -> Tensor:
    """Which experts each token is routed to, bool `[num_tokens, num_experts]`."""
    hit = torch.zeros(len(block.topk_ids), num_experts, dtype=torch.bool, device=block.topk_ids.device)
    return hit.scatter_(1, block.topk_ids.long(), True)
