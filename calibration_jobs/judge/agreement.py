"""How far two similarity matrices of a layer agree. Pure functions of matrices."""

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from sere.calibration_jobs.metrics.base import Matrices


def spearman(first: Tensor, second: Tensor) -> float:
    """Spearman rank correlation of the entries above the diagonal; nan where all entries of one are equal.

    Args:
        first: Symmetric, `[num_experts, num_experts]`.
        second: Same shape.
    """
    import warnings

    from scipy.stats import ConstantInputWarning, spearmanr

    rows, columns = torch.triu_indices(len(first), len(first), offset=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(spearmanr(first[rows, columns].numpy(), second[rows, columns].numpy()).statistic)


def nearest(similarity: Tensor) -> Tensor:
    """The most similar other expert of each expert (of equal ones the lowest), int64 `[num_experts]`."""
    diagonal = torch.eye(len(similarity), dtype=torch.bool)
    return similarity.masked_fill(diagonal, -torch.inf).argmax(dim=1)


def decision_agreement(first: Tensor, second: Tensor) -> float:
    """Share of experts that have the same nearest expert in both."""
    return float((nearest(first) == nearest(second)).double().mean())


def agreement(first: Matrices, second: Matrices, metrics: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Both figures by metric: over all layers (means), and by layer.

    Returns:
        `{metric: {"spearman": float, "decision": float, "layers": {layer: [spearman, decision]}}}`.
    """
    result = {}
    for metric in metrics:
        layers = {
            layer: [spearman(matrix, second[layer, name]), decision_agreement(matrix, second[layer, name])]
            for (layer, name), matrix in sorted(first.items())
            if name == metric
        }
        means = [fmean(column) for column in zip(*layers.values(), strict=True)]
        result[metric] = {"spearman": means[0], "decision": means[1], "layers": layers}
    return result


def transfer(by_domain: Sequence[tuple[str, Matrices]], metric: str) -> dict[str, Any]:
    """Agreement of every pair of domains' matrices.

    Returns:
        `{"domains": [...], "spearman": [[...]], "decision": [[...]]}`.
    """
    result: dict[str, Any] = {"domains": [name for name, _ in by_domain], "spearman": [], "decision": []}
    for _, first in by_domain:
        pairs = [agreement(first, second, [metric])[metric] for _, second in by_domain]
        for figure in ("spearman", "decision"):
            result[figure].append([pair[figure] for pair in pairs])
    return result


def off_diagonal(matrix: Tensor) -> Tensor:
    """The entries off the diagonal, flat."""
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]
