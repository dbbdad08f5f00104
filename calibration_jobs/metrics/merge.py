"""Sums of shards, added up: all tokens and every domain, by halves of the data."""

from collections.abc import Iterator

from sere.calibration_jobs.metrics import METRIC_CLASSES
from sere.calibration_jobs.metrics.base import Matrices, ShardSums, SimilarityMetric, SumKey
from sere.calibration_jobs.shards import Shard


class MergedSums:
    """What the shards added so far say. Memory does not grow with their number."""

    def __init__(self) -> None:
        self._halves: tuple[dict[SumKey, SimilarityMetric], ...] = ({}, {})
        self.num_shards = 0

    def add(self, shard: Shard, found: ShardSums) -> None:
        """Add a shard's sums."""
        half = self._halves[shard.half]
        for key, tensor in found.sums.items():
            part = METRIC_CLASSES[key.metric](len(tensor))
            part.sums, part.num_tokens = tensor.clone(), found.num_tokens[key.domain]
            known = half.setdefault(key, part)
            if known is not part:
                known.merge(part)
        self.num_shards += 1

    def _merged(self, domain: int | None, half: int | None) -> dict[tuple[int, str], SimilarityMetric]:
        merged: dict[tuple[int, str], SimilarityMetric] = {}
        for group in self._halves if half is None else (self._halves[half],):
            for key, metric in group.items():
                if key.domain == domain:
                    place = key.layer, key.metric
                    total = merged.setdefault(place, METRIC_CLASSES[key.metric](len(metric.sums)))
                    total.merge(metric)
        return merged

    def matrices(self, *, domain: int | None = None, half: int | None = None) -> Matrices:
        """The similarities from all tokens, or from those of one domain (by its number) or half; empty if there are none."""
        return {key: metric.finalize() for key, metric in self._merged(domain, half).items() if metric.num_tokens}

    def num_tokens(self, *, domain: int | None = None, half: int | None = None) -> int:
        """Tokens of those."""
        return next((metric.num_tokens for metric in self._merged(domain, half).values()), 0)


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
