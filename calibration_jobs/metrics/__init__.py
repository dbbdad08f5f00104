"""Similarity of experts as mergeable sums; one metric, one file. Read base.py first: it holds the nouns."""

import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from sere.calibration_jobs.metrics.base import SimilarityMetric


class _MetricClasses(Mapping[str, "type[SimilarityMetric]"]):
    """The token metrics by name. A class is imported when it is asked for: listing the names loads no torch."""

    _PLACES = {"frobenius": "FrobeniusMetric", "cosine": "CosineMetric", "cka": "CkaMetric"}  # noqa: RUF012

    def __getitem__(self, name: str) -> "type[SimilarityMetric]":
        class_name = self._PLACES[name]
        return getattr(importlib.import_module(f"{__name__}.{name}"), class_name)

    def __contains__(self, name: object) -> bool:
        return name in self._PLACES

    def __iter__(self) -> Iterator[str]:
        return iter(self._PLACES)

    def __len__(self) -> int:
        return len(self._PLACES)


METRIC_CLASSES: Mapping[str, "type[SimilarityMetric]"] = _MetricClasses()
"""What a name in `metrics` stands for; `weights`, which needs no tokens, is not among them."""


def similarity_matrices(outputs: "Tensor", metrics: Iterable[str] = ("frobenius", "cosine", "cka")) -> dict[str, "Tensor"]:
    """Similarity of one layer's experts from all their outputs at once.

    Args:
        outputs: float `[num_experts, num_tokens, hidden_size]`, every token valid.
        metrics: Names from `METRIC_CLASSES`.

    Returns:
        float32 `[num_experts, num_experts]` by metric. "cka" is the unbiased estimate over all tokens as one minibatch,
        clamped to [0, 1].

    Raises:
        ValueError: if a metric is unknown or the outputs have no tokens.
    """
    result = {}
    for name in metrics:
        if name not in METRIC_CLASSES:
            raise ValueError(f"unknown metric {name!r}: valid are {', '.join(METRIC_CLASSES)}")
        metric = METRIC_CLASSES[name](outputs.shape[0])
        metric.update(outputs)
        result[name] = metric.finalize()
    return result
