"""Expert similarity of one layer as mergeable sums over calibration tokens.

Let Y[e] be the outputs of expert e for the same n tokens, `[n, hidden_size]`. Every metric keeps one float64
`[num_experts, num_experts]` sum, to which minibatches of tokens can be added anywhere and in any order.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

# Elements of a float64 scratch tensor. On the CPU 2 MiB: it stays in cache, which halves the time of the sums. On a GPU
# 256 MiB: every block is several kernel launches.
_CPU_BLOCK_ELEMENTS = 1 << 18
_BLOCK_ELEMENTS = 1 << 25


def _block_elements(outputs: Tensor) -> int:
    return _CPU_BLOCK_ELEMENTS if outputs.device.type == "cpu" else _BLOCK_ELEMENTS


def _inner_products(outputs: Tensor, *, unit: bool = False) -> Tensor:
    """Inner products of all pairs of experts' outputs, computed in float64 over blocks of tokens.

    Args:
        outputs: float `[num_experts, num_tokens, hidden_size]`.
        unit: Scale every token's output to length 1 first.

    Returns:
        float64 `[num_experts, num_experts]`.
    """
    num_experts, _, hidden_size = outputs.shape
    total = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=outputs.device)
    for block in outputs.split(max(1, _block_elements(outputs) // (num_experts * hidden_size)), dim=1):
        block = block.double()
        if unit:
            block = torch.nn.functional.normalize(block, dim=-1)
        flat = block.flatten(1)
        total.addmm_(flat, flat.T)
    return total


class SimilarityMetric(ABC):
    """Sums of one metric over minibatches of tokens.

    Attributes:
        sums: float64 `[num_experts, num_experts]`.
        num_tokens: Tokens seen.
    """

    def __init__(self, num_experts: int) -> None:
        self.sums = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        self.num_tokens = 0

    def update(self, outputs: Tensor) -> None:
        """Add a minibatch: outputs of every expert for the same tokens, float `[num_experts, num_tokens, hidden_size]`."""
        if outputs.ndim != 3 or outputs.shape[0] != self.sums.shape[0]:
            raise ValueError(f"outputs must be [{self.sums.shape[0]}, num_tokens, hidden_size], got {list(outputs.shape)}")
        if outputs.shape[1]:
            self.sums += self._sum(outputs).cpu()
            self.num_tokens += outputs.shape[1]

    def merge(self, other: "SimilarityMetric") -> None:
        """Add the sums of another shard."""
        self.sums += other.sums
        self.num_tokens += other.num_tokens

    def finalize(self) -> Tensor:
        """The similarity, float32 `[num_experts, num_experts]`: symmetric, diagonal 1, values in [0, 1].

        Raises:
            ValueError: if no tokens were seen, or the outputs were not finite.
        """
        if self.num_tokens == 0:
            raise ValueError("no tokens were seen")
        if not torch.isfinite(self.sums).all():
            raise ValueError("expert outputs were not finite: run the calibration in a wider dtype")
        similarity = self._similarity().clamp(0, 1)
        return ((similarity + similarity.T) / 2).fill_diagonal_(1).float()

    @abstractmethod
    def _sum(self, outputs: Tensor) -> Tensor:
        """The minibatch's summand, float64 `[num_experts, num_experts]`."""

    @abstractmethod
    def _similarity(self) -> Tensor:
        """The similarity from the sums."""


class CosineMetric(SimilarityMetric):
    """Mean over tokens of the cosine of two experts' outputs, mapped from [-1, 1] to [0, 1]."""

    def _sum(self, outputs: Tensor) -> Tensor:
        return _inner_products(outputs, unit=True)

    def _similarity(self) -> Tensor:
        return (self.sums / self.num_tokens + 1) / 2


class FrobeniusMetric(SimilarityMetric):
    """1 - D / max(D), with D[i, j] the Frobenius norm of Y[i] - Y[j] (the paper's choice)."""

    def _sum(self, outputs: Tensor) -> Tensor:
        return _inner_products(outputs)

    def _similarity(self) -> Tensor:
        squares = self.sums.diagonal()
        distance = (squares[:, None] + squares[None, :] - 2 * self.sums).clamp(min=0).sqrt()
        return 1 - distance / distance.max().clamp(min=torch.finfo(torch.float64).tiny)


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
        side = max(1, math.isqrt(_block_elements(outputs) // num_experts))
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


METRIC_CLASSES: Mapping[str, type[SimilarityMetric]] = MappingProxyType(
    {"frobenius": FrobeniusMetric, "cosine": CosineMetric, "cka": CkaMetric}
)


def similarity_matrices(outputs: Tensor, metrics: Iterable[str] = ("frobenius", "cosine", "cka")) -> dict[str, Tensor]:
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
