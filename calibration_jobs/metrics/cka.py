"""Centred kernel alignment of experts' outputs."""

import itertools
import math

import torch
from torch import Tensor

from sere.calibration_jobs.metrics.base import SimilarityMetric, block_elements


class CkaMetric(SimilarityMetric):
    """Linear centred kernel alignment, from the unbiased estimator of HSIC.

    HSIC: Song et al. 2012, equation 4. Sums over minibatches: Nguyen, Raghu and Kornblith 2021, equation 3. The biased
    estimator inflates the similarity of small minibatches by 0.3 and more. A minibatch under four tokens has no estimate and
    is left out.
    """

    def _sum(self, outputs: Tensor) -> Tensor:
        num_experts, n, _ = outputs.shape
        if n < 4:
            return torch.zeros(num_experts, num_experts, dtype=torch.float64)
        # HSIC does not depend on the mean. Without it, float32 Grams keep the digits that matter.
        outputs = outputs.float()
        outputs = outputs - outputs.mean(1, keepdim=True)
        traces = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=outputs.device)
        row_sums = torch.zeros(num_experts, n, dtype=torch.float64, device=outputs.device)
        # Every expert's token-by-token Gram matrix, diagonal set to zero, in square tiles [num_experts, side, side]: scratch
        # does not grow with n, and the tiles below the diagonal, which mirror those above, are not computed.
        side = max(1, math.isqrt(block_elements(outputs) // num_experts))
        for i, j in itertools.combinations_with_replacement(range(0, n, side), 2):
            tile = outputs[:, i : i + side] @ outputs[:, j : j + side].transpose(1, 2)
            tile = (tile.triu_(1) if i == j else tile).double()
            row_sums[:, i : i + side] += tile.sum(2)
            row_sums[:, j : j + side] += tile.sum(1)
            flat = tile.flatten(1)
            traces.addmm_(flat, flat.T, alpha=2)
        totals = row_sums.sum(1)
        return (traces + totals[:, None] * totals[None, :] / ((n - 1) * (n - 2)) - 2 / (n - 2) * (row_sums @ row_sums.T)) / (
            n * (n - 3)
        )

    def _similarity(self) -> Tensor:
        scale = self.sums.diagonal().clamp(min=0).sqrt()
        denominator = scale[:, None] * scale[None, :]
        # An expert whose outputs do not vary has no alignment with any other.
        return torch.where(denominator > 0, self.sums / denominator.clamp(min=1e-300), 0.0)
