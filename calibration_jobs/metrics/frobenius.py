"""Frobenius distance of experts' outputs, as a similarity."""

import torch
from torch import Tensor

from sere.calibration_jobs.metrics.base import SimilarityMetric, inner_products


class FrobeniusMetric(SimilarityMetric):
    """1 - D / max(D), with D[i, j] the Frobenius norm of Y[i] - Y[j] (the paper's choice)."""

    def _sum(self, outputs: Tensor) -> Tensor:
        return inner_products(outputs)

    def _similarity(self) -> Tensor:
        squares = self.sums.diagonal()
        distance = (squares[:, None] + squares[None, :] - 2 * self.sums).clamp(min=0).sqrt()
        return 1 - distance / distance.max().clamp(min=torch.finfo(torch.float64).tiny)
