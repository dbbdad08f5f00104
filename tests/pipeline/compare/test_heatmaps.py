"""The order of a heatmap."""

import itertools

import torch

from sere.pipeline.compare.heatmaps import cluster_order


def test_clusters_stay_together():
    group = torch.tensor([0, 1, 2] * 4)
    matrix = torch.where(group[:, None] == group[None, :], 0.9, 0.1).fill_diagonal_(1)
    ordered = group[cluster_order(matrix)].tolist()
    assert sorted(cluster_order(matrix)) == list(range(12))
    assert len(list(itertools.groupby(ordered))) == 3
