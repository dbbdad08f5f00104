"""The nouns of the metrics: sums of one layer's expert outputs that minibatches and shards add to, and what they are called.

Let Y[e] be the outputs of expert e for the same n tokens, `[n, hidden_size]`. Every metric keeps one float64
`[num_experts, num_experts]` sum, to which minibatches of tokens can be added anywhere and in any order.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Matrices = dict[tuple[int, str], Tensor]
"""Similarities, float32 `[num_experts, num_experts]` by layer and metric."""

# Elements of a float64 scratch tensor. On the CPU 2 MiB: it stays in cache, which halves the time of the sums. On a GPU
# 256 MiB: every block is several kernel launches.
_CPU_BLOCK_ELEMENTS = 1 << 18
_BLOCK_ELEMENTS = 1 << 25
# How stored results call all domains together.
_ALL = "all"


def _domain_name(domain: int | None) -> str:
    return _ALL if domain is None else str(domain)


def _domain_of(name: str) -> int | None:
    return None if name == _ALL else int(name)


@dataclass(frozen=True)
class SumKey:
    """What one sum is of. The worker that makes the sum fills it in."""

    layer: int
    metric: str
    domain: int | None = None
    """Place in the plan's domains of those whose tokens are summed; None: of all tokens."""

    def to_name(self) -> str:
        """How a stored result calls the sum: `LAYER.METRIC.DOMAIN`."""
        return f"{self.layer}.{self.metric}.{_domain_name(self.domain)}"

    @classmethod
    def from_name(cls, name: str) -> "SumKey":
        """The key that `to_name` wrote."""
        layer, metric, domain = name.split(".")
        return cls(int(layer), metric, _domain_of(domain))


@dataclass(frozen=True)
class TableKey:
    """What one sum of a table is of. The worker that makes the sum fills it in."""

    layer: int
    table: str
    name: str
    """Of the sum, within the table's class."""

    def to_name(self) -> str:
        """How a stored result calls the sum: `LAYER.TABLE.all.NAME`."""
        return f"{self.layer}.{self.table}.{_ALL}.{self.name}"

    @staticmethod
    def is_name(name: str) -> bool:
        """Whether a stored result calls a table's sum so."""
        return name.count(".") == 3

    @classmethod
    def from_name(cls, name: str) -> "TableKey":
        """The key that `to_name` wrote."""
        layer, table, _, own = name.split(".")
        return cls(int(layer), table, own)


@dataclass(frozen=True, kw_only=True)
class ShardSums:
    """All sums over a group's shards, or over the first of them. A worker fills it; the driver merges it."""

    sums: Mapping[SumKey, Tensor]
    """float64 `[num_experts, num_experts]` each."""
    tables: Mapping["TableKey", Tensor] = field(default_factory=lambda: dict[TableKey, Tensor]())
    """Sums of the tables, of all tokens."""
    num_tokens: Mapping[int | None, int]
    """Tokens of each domain, and of all under None."""
    num_shards: int
    """Shards that were summed up."""
    elapsed_s: float
    peak_memory_bytes: int
    """What the worker held at most so far."""

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in (*self.sums.values(), *self.tables.values()))

    def to_result(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As a task's result: tensors by name, and what JSON can hold."""
        info = {
            "num_tokens": {_domain_name(domain): count for domain, count in self.num_tokens.items()},
            "num_shards": self.num_shards,
            "elapsed_s": self.elapsed_s,
            "peak_memory_bytes": self.peak_memory_bytes,
        }
        tensors = {key.to_name(): tensor for key, tensor in self.sums.items()}
        return tensors | {key.to_name(): tensor for key, tensor in self.tables.items()}, info

    @classmethod
    def from_result(cls, result: tuple[Mapping[str, Tensor], Mapping[str, Any]]) -> "ShardSums":
        """What `to_result` wrote; in one order, whether it comes from a worker or from a file."""
        tensors, info = dict(sorted(result[0].items())), result[1]
        return cls(
            sums={SumKey.from_name(name): tensor for name, tensor in tensors.items() if not TableKey.is_name(name)},
            tables={TableKey.from_name(name): tensor for name, tensor in tensors.items() if TableKey.is_name(name)},
            num_tokens={_domain_of(name): count for name, count in info["num_tokens"].items()},
            # There were no groups at first.
            num_shards=info.get("num_shards", 1),
            elapsed_s=info["elapsed_s"],
            peak_memory_bytes=info["peak_memory_bytes"],
        )


class SimilarityMetric(ABC):
    """Sums of one metric over minibatches of tokens.

    Attributes:
        sums: float64 `[num_experts, num_experts]`.
        num_tokens: Tokens seen.
    """

    def __init__(self, num_experts: int) -> None:
        self.sums = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        self.num_tokens = 0

    def update(self, outputs: Tensor) -> None:
        """Add a minibatch: outputs of every expert for the same tokens, float `[num_experts, num_tokens, hidden_size]`."""
        if outputs.ndim != 3 or outputs.shape[0] != self.sums.shape[0]:
            raise ValueError(f"outputs must be [{self.sums.shape[0]}, num_tokens, hidden_size], got {list(outputs.shape)}")
        if outputs.shape[1]:
            self.sums += self._sum(outputs).cpu()
            self.num_tokens += outputs.shape[1]

    def merge(self, other: "SimilarityMetric") -> None:
        """Add the sums of another shard."""
        self.sums += other.sums
        self.num_tokens += other.num_tokens

    def finalize(self) -> Tensor:
        """The similarity, float32 `[num_experts, num_experts]`: symmetric, diagonal 1, values in [0, 1].

        Raises:
            ValueError: if no tokens were seen, or the outputs were not finite.
        """
        if self.num_tokens == 0:
            raise ValueError("no tokens were seen")
        if not torch.isfinite(self.sums).all():
            raise ValueError("expert outputs were not finite: run the calibration in a wider dtype")
        similarity = self._similarity().clamp(0, 1)
        return ((similarity + similarity.T) / 2).fill_diagonal_(1).float()

    @abstractmethod
    def _sum(self, outputs: Tensor) -> Tensor:
        """The minibatch's summand, float64 `[num_experts, num_experts]`."""

    @abstractmethod
    def _similarity(self) -> Tensor:
        """The similarity from the sums."""


def block_elements(outputs: Tensor) -> int:
    """Elements of a float64 scratch tensor on the device of `outputs`."""
    return _CPU_BLOCK_ELEMENTS if outputs.device.type == "cpu" else _BLOCK_ELEMENTS


def inner_products(outputs: Tensor, *, unit: bool = False) -> Tensor:
    """Inner products of all pairs of experts' outputs, computed in float64 over blocks of tokens.

    Args:
        outputs: float `[num_experts, num_tokens, hidden_size]`.
        unit: Scale every token's output to length 1 first.

    Returns:
        float64 `[num_experts, num_experts]`.
    """
    num_experts, _, hidden_size = outputs.shape
    total = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=outputs.device)
    for block in outputs.split(max(1, block_elements(outputs) // (num_experts * hidden_size)), dim=1):
        block = block.double()
        if unit:
            block = torch.nn.functional.normalize(block, dim=-1)
        flat = block.flatten(1)
        total.addmm_(flat, flat.T)
    return total
