"""Similarity of experts as mergeable sums; one metric, one file. Read base.py first: it holds the nouns."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sere.conf.lazy_table import LazyTable

if TYPE_CHECKING:
    from torch import Tensor

    from sere.calibration_jobs.metrics.base import SimilarityMetric

METRIC_CLASSES: "LazyTable[type[SimilarityMetric]]" = LazyTable(
    "metric",
    {
        "frobenius": "sere.calibration_jobs.metrics.frobenius:FrobeniusMetric",
        "cosine": "sere.calibration_jobs.metrics.cosine:CosineMetric",
        "cka": "sere.calibration_jobs.metrics.cka:CkaMetric",
    },
)
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
        ValueError: if a metric is unknown (a ConfigError), or the outputs have no tokens.
    """
    result = {}
    for name in metrics:
        metric = METRIC_CLASSES[name](outputs.shape[0])
        metric.update(outputs)
        result[name] = metric.finalize()
    return result
