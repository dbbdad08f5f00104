"""Agreement of matrices."""

import itertools
import math

import torch

from sere.calibration_jobs.judge.agreement import agreement, decision_agreement, nearest, spearman, transfer


def symmetric(seed: int, size: int = 7) -> torch.Tensor:
    values = torch.rand(size, size, generator=torch.Generator().manual_seed(seed))
    return ((values + values.T) / 2).fill_diagonal_(1)


def test_spearman_is_the_correlation_of_ranks():
    first, second = symmetric(0), symmetric(1)
    pairs = list(itertools.combinations(range(7), 2))
    ranks = [torch.tensor([matrix[pair] for pair in pairs]).argsort().argsort().double() for matrix in (first, second)]
    expected = torch.corrcoef(torch.stack(ranks))[0, 1].item()
    assert math.isclose(spearman(first, second), expected, abs_tol=1e-12)
    assert math.isclose(spearman(first, first**3), 1), "only ranks count"
    assert math.isnan(spearman(first, torch.ones(7, 7)))


def test_nearest_is_another_expert_and_the_lowest_of_equals():
    matrix = torch.tensor([[1, 0.5, 0.5], [0.5, 1, 0.2], [0.5, 0.2, 1.0]])
    assert nearest(matrix).tolist() == [1, 0, 0]
    assert decision_agreement(matrix, matrix) == 1
    assert decision_agreement(matrix, torch.tensor([[1, 0, 0.5], [0, 1, 0.2], [0.5, 0.2, 1.0]])) == 1 / 3


def test_agreement_and_transfer():
    a = {(layer, "cka"): symmetric(layer) for layer in (0, 1)}
    b = {(layer, "cka"): symmetric(layer + 9) for layer in (0, 1)}
    found = agreement(a, b, ["cka"])["cka"]
    assert found["layers"][1] == [spearman(a[1, "cka"], b[1, "cka"]), decision_agreement(a[1, "cka"], b[1, "cka"])]
    assert math.isclose(found["spearman"], sum(found["layers"][layer][0] for layer in (0, 1)) / 2)
    table = transfer([("x", a), ("y", b)], "cka")
    assert table["domains"] == ["x", "y"] and table["spearman"][0][0] == 1
    assert table["spearman"][0][1] == table["spearman"][1][0] == found["spearman"]
