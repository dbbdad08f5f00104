"""Sums of a group's shards while a worker adds to them. Knows nothing of models: it is handed outputs of experts."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

from sere.calibration_jobs.capture.experts import TokenBlock
from sere.calibration_jobs.metrics import METRIC_CLASSES
from sere.calibration_jobs.metrics.base import ShardSums, SimilarityMetric, SumKey, TableKey
from sere.calibration_jobs.tables import TABLE_CLASSES
from sere.calibration_jobs.tables.base import TableSpec


class RunningSums:
    """Similarities of all tokens and of each domain's, and tables of all tokens, in float64.

    Attributes:
        num_shards: Shards that were summed up.
    """

    def __init__(
        self, specs: Mapping[int, TableSpec], metrics: Sequence[str], tables: Sequence[str], begun: ShardSums | None = None
    ) -> None:
        """Nothing is summed yet, or what another worker had summed.

        Args:
            specs: Of each layer.
            metrics: Names from `METRIC_CLASSES`.
            tables: Names from `TABLE_CLASSES`.
            begun: What `checkpoint` returned.
        """
        self._specs, self._metrics = specs, metrics
        self._sums: dict[SumKey, SimilarityMetric] = {}
        self._tables = {(layer, table): TABLE_CLASSES[table](spec) for layer, spec in specs.items() for table in tables}
        self._num_tokens: Counter[int | None] = Counter()
        self._elapsed_s = 0.0
        self.num_shards = 0
        if begun is None:
            return
        for key, tensor in begun.sums.items():
            self._of(key).sums = tensor
        for table_key, tensor in begun.tables.items():
            self._tables[table_key.layer, table_key.table].sums[table_key.name] = tensor
        self._num_tokens.update(begun.num_tokens)
        self._elapsed_s, self.num_shards = begun.elapsed_s, begun.num_shards

    def _of(self, key: SumKey) -> SimilarityMetric:
        if key not in self._sums:
            self._sums[key] = METRIC_CLASSES[key.metric](self._specs[key.layer].num_experts)
        return self._sums[key]

    def add_outputs(self, layer: int, outputs: Tensor, domains: Tensor | None) -> None:
        """Add a block of tokens to the similarities.

        Args:
            layer: Of the experts.
            outputs: Float `[num_experts, num_tokens, hidden_size]`.
            domains: Of each token, int64 `[num_tokens]`; None: they are not told apart.
        """
        for domain in (None, *(domains.unique().tolist() if domains is not None else ())):
            own = outputs if domain is None else outputs[:, (domains == domain).to(outputs.device)]
            for metric in self._metrics:
                self._of(SumKey(layer, metric, domain)).update(own)

    def add_block(self, layer: int, block: TokenBlock) -> None:
        """Add a block of tokens to the tables."""
        for (of_layer, _), table in self._tables.items():
            if of_layer == layer:
                table.update(block)

    def end_shard(self, num_tokens: Mapping[int | None, int], elapsed_s: float) -> None:
        """Count a shard, all of whose tokens were added.

        Args:
            num_tokens: Its tokens by domain, and all of them under None.
            elapsed_s: What it took.
        """
        self._num_tokens.update(num_tokens)
        self._elapsed_s += elapsed_s
        self.num_shards += 1

    def not_finite(self) -> int | None:
        """A layer whose sums are not finite; None if all are."""
        made = [(key.layer, metric.sums) for key, metric in self._sums.items()]
        made += [(layer, value) for (layer, _), table in self._tables.items() for value in table.sums.values()]
        return next((layer for layer, value in made if not value.isfinite().all()), None)

    def progress(self, peak_memory_bytes: int) -> ShardSums:
        """How far it is, without the sums."""
        return ShardSums(
            sums={},
            num_tokens=dict(self._num_tokens),
            num_shards=self.num_shards,
            elapsed_s=self._elapsed_s,
            peak_memory_bytes=peak_memory_bytes,
        )

    def checkpoint(self, peak_memory_bytes: int) -> ShardSums:
        """All that it takes to go on to the same bits. Holds the very sums: for use before more is added."""
        sums = {key: metric.sums for key, metric in self._sums.items()}
        tables = {
            TableKey(layer, table, name): value
            for (layer, table), part in self._tables.items()
            for name, value in part.sums.items()
        }
        return dataclasses.replace(self.progress(peak_memory_bytes), sums=sums, tables=tables)

    def finished(self, peak_memory_bytes: int) -> ShardSums:
        """The group's sums. Half the bytes of tables: what is summed in float64 is kept to seven digits."""
        found = self.checkpoint(peak_memory_bytes)
        return dataclasses.replace(found, tables={key: value.float() for key, value in found.tables.items()})
