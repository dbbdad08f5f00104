"""Sums of shards, added up: all tokens and every domain, by halves of the data."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from sere.calibration_jobs.metrics.base import METRIC_CLASSES, SimilarityMetric
from sere.calibration_jobs.shards import Shard

ALL = "all"
Matrices = dict[tuple[int, str], Tensor]
"""float32 `[num_experts, num_experts]` by layer and metric."""


class MergedSums:
    """What the shards added so far say. Memory does not grow with their number."""

    def __init__(self) -> None:
        self._halves: tuple[dict[str, SimilarityMetric], ...] = ({}, {})
        self.num_shards = 0

    def add(self, shard: Shard, sums: Mapping[str, Tensor], num_tokens: Mapping[str, int]) -> None:
        """Add a shard's sums.

        Args:
            shard: Which one.
            sums: float64 `[num_experts, num_experts]` by key: `key_of(layer, metric, domain)`.
            num_tokens: Tokens by domain number, and of all domains under "all".
        """
        half = self._halves[shard.half]
        for key, tensor in sums.items():
            _, name, domain = _parts(key)
            part = METRIC_CLASSES[name](len(tensor))
            part.sums, part.num_tokens = tensor.clone(), num_tokens[domain]
            known = half.setdefault(key, part)
            if known is not part:
                known.merge(part)
        self.num_shards += 1

    def _merged(self, domain: str, half: int | None) -> dict[tuple[int, str], SimilarityMetric]:
        merged: dict[tuple[int, str], SimilarityMetric] = {}
        for group in self._halves if half is None else (self._halves[half],):
            for key, metric in group.items():
                layer, name, of_domain = _parts(key)
                if of_domain == domain:
                    total = merged.setdefault((layer, name), METRIC_CLASSES[name](len(metric.sums)))
                    total.merge(metric)
        return merged

    def matrices(self, *, domain: int | None = None, half: int | None = None) -> Matrices:
        """The similarities from all tokens, or from those of one domain (by its number) or half; empty if there are none."""
        return {key: metric.finalize() for key, metric in self._merged(_domain(domain), half).items() if metric.num_tokens}

    def num_tokens(self, *, domain: int | None = None, half: int | None = None) -> int:
        """Tokens of those."""
        return next((metric.num_tokens for metric in self._merged(_domain(domain), half).values()), 0)


def _domain(number: int | None) -> str:
    return ALL if number is None else str(number)


def key_of(layer: int, metric: str, domain: int | None = None) -> str:
    """Name of a sum: of all tokens, or of those of one domain."""
    return f"{layer}.{metric}.{_domain(domain)}"


def _parts(key: str) -> tuple[int, str, str]:
    layer, metric, domain = key.split(".")
    return int(layer), metric, domain


class InOrder:
    """Merges shards in the order of their index, as far as all before them have arrived.

    The sum then does not depend on which worker was faster, to the last bit.
    """

    def __init__(self, shards: tuple[Shard, ...]) -> None:
        self._shards = shards
        self._arrived: set[int] = set()
        self._next = 0

    def arrive(self, shard: Shard) -> Iterator[Shard]:
        """Note an arrival; yields the shards whose turn it now is."""
        self._arrived.add(shard.index)
        while self._next in self._arrived:
            self._arrived.remove(self._next)
            self._next += 1
            yield self._shards[self._next - 1]
