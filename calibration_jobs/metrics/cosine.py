"""Cosine similarity of experts' outputs."""

from torch import Tensor

from sere.calibration_jobs.metrics.base import SimilarityMetric, inner_products


class CosineMetric(SimilarityMetric):
    """Mean over tokens of the cosine of two experts' outputs, mapped from [-1, 1] to [0, 1]."""

    def _sum(self, outputs: Tensor) -> Tensor:
        return inner_products(outputs, unit=True)

    def _similarity(self) -> Tensor:
        return (self.sums / self.num_tokens + 1) / 2
