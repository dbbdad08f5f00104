"""Sums of groups of shards, added up: all tokens and every domain, by halves of the data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean

from torch import Tensor

from sere.calibration_jobs.metrics import METRIC_CLASSES
from sere.calibration_jobs.metrics.base import Matrices, ShardSums, SimilarityMetric, SumKey
from sere.calibration_jobs.shards import Group
from sere.calibration_jobs.tables import TABLE_CLASSES
from sere.calibration_jobs.tables.base import TableSpec, TableSums
from sere.calibration_jobs.tables.norms import super_experts
from sere.calibration_jobs.tables.surrogates import SurrogateSums

# What the sums of several large models' groups take; the total itself takes as much or more.
_WAITING_BYTES = 2 * 10**9

Tables = dict[tuple[int, str], Tensor]
"""Tables by layer and name (`sere.ops.similarity_checks.TABLES`)."""


class MergedSums:
    """What the groups added so far say. Memory does not grow with their number."""

    def __init__(self, specs: Mapping[int, TableSpec] | None = None) -> None:
        """Nothing is added yet.

        Args:
            specs: What each layer's tables depend on; not needed without tables.
        """
        self._specs = specs or {}
        self._halves: tuple[dict[SumKey, SimilarityMetric], ...] = ({}, {})
        self._tables: dict[tuple[int, str], TableSums] = {}
        self._num_tokens = 0
        self.num_shards = 0

    def add(self, group: Group, found: ShardSums) -> None:
        """Add a group's sums."""
        half = self._halves[group.half]
        for key, tensor in found.sums.items():
            part = METRIC_CLASSES[key.metric](len(tensor))
            part.sums, part.num_tokens = tensor, found.num_tokens[key.domain]
            if key not in half:
                half[key] = METRIC_CLASSES[key.metric](len(tensor))
            half[key].merge(part)
        parts: dict[tuple[int, str], dict[str, Tensor]] = {}
        for table_key, tensor in found.tables.items():
            parts.setdefault((table_key.layer, table_key.table), {})[table_key.name] = tensor
        for place, sums in parts.items():
            if place not in self._tables:
                self._tables[place] = TABLE_CLASSES[place[1]](self._specs[place[0]])
            self._tables[place].merge(TABLE_CLASSES[place[1]](self._specs[place[0]], sums))
        self._num_tokens += found.num_tokens[None]
        self.num_shards += found.num_shards

    def tables(self) -> Tables:
        """All tables, from all tokens."""
        found: Tables = {}
        largest = {layer: part.sums["largest"] for (layer, name), part in self._tables.items() if name == "protected"}
        for (layer, name), part in self._tables.items():
            if name != "protected":
                found |= {(layer, table): tensor for table, tensor in part.finalize().items()}
        return found | {(layer, "protected"): tensor for layer, tensor in (super_experts(largest) if largest else {}).items()}

    def explained(self) -> list[float]:
        """Share of the outputs' variance that surrogates of rank 0, 1, ... explain, mean over layers; empty without them."""
        shares = [part.explained() for part in self._tables.values() if isinstance(part, SurrogateSums)]
        return [fmean(column) for column in zip(*shares, strict=True)]

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
        if domain is None and half is None:
            return self._num_tokens
        return next((metric.num_tokens for metric in self._merged(domain, half).values()), 0)


class InOrder:
    """Hands out the sums of groups in the order of their index, as far as all before them have arrived.

    The total then does not depend on which worker was faster, to the last bit. What has to wait does so in memory, up to a
    bound; the rest is read again when its turn comes.
    """

    def __init__(self, groups: Sequence[Group], read: Callable[[Group], ShardSums], *, max_bytes: int = _WAITING_BYTES) -> None:
        """Nothing has arrived yet.

        Args:
            groups: All of the plan.
            read: Reads what was kept of a group.
            max_bytes: Of sums that wait in memory.
        """
        self._groups, self._read, self._max_bytes = groups, read, max_bytes
        self._waiting: dict[int, ShardSums | None] = {}
        self._next = 0

    def arrive(self, group: Group, found: ShardSums) -> Iterator[tuple[Group, ShardSums]]:
        """Note an arrival; yields the groups whose turn it now is, with their sums."""
        waiting = sum(sums.num_bytes for sums in self._waiting.values() if sums is not None)
        fits = group.index == self._next or waiting + found.num_bytes <= self._max_bytes
        self._waiting[group.index] = found if fits else None
        while self._next in self._waiting:
            sums, group = self._waiting.pop(self._next), self._groups[self._next]
            self._next += 1
            yield group, sums if sums is not None else self._read(group)
