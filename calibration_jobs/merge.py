"""Sums of shards, added up by domain and half of the data."""

from collections import defaultdict
from collections.abc import Iterator, Mapping

from torch import Tensor

from calibration_jobs.metrics import METRIC_CLASSES, SimilarityMetric
from calibration_jobs.plan import Shard

Matrices = dict[tuple[int, str], Tensor]
"""float32 `[num_experts, num_experts]` by layer and metric."""


class MergedSums:
    """What the shards added so far say. Memory does not grow with their number."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, int], dict[tuple[int, str], SimilarityMetric]] = defaultdict(dict)
        self.num_shards = 0

    def add(self, shard: Shard, sums: Mapping[str, Tensor], num_tokens: int) -> None:
        """Add a shard's sums: float64 `[num_experts, num_experts]` by `LAYER.METRIC`."""
        group = self._groups[shard.domain, shard.half]
        for key, tensor in sums.items():
            layer, name = key.split(".")
            part = METRIC_CLASSES[name](len(tensor))
            part.sums, part.num_tokens = tensor.clone(), num_tokens
            known = group.setdefault((int(layer), name), part)
            if known is not part:
                known.merge(part)
        self.num_shards += 1

    def _merged(self, domain: str | None, half: int | None) -> dict[tuple[int, str], SimilarityMetric]:
        merged: dict[tuple[int, str], SimilarityMetric] = {}
        for (group_domain, group_half), group in sorted(self._groups.items()):
            if domain not in (None, group_domain) or half not in (None, group_half):
                continue
            for key, metric in group.items():
                if key not in merged:
                    merged[key] = METRIC_CLASSES[key[1]](len(metric.sums))
                merged[key].merge(metric)
        return merged

    def matrices(self, *, domain: str | None = None, half: int | None = None) -> Matrices:
        """The similarities from all shards, or from those of one domain or half; empty if there are none."""
        return {key: metric.finalize() for key, metric in self._merged(domain, half).items()}

    def num_tokens(self, *, domain: str | None = None, half: int | None = None) -> int:
        """Tokens in those shards."""
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
