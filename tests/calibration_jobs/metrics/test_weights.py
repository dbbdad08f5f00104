"""Similarity of weights."""

import torch

from sere.calibration_jobs.metrics.weights import weight_similarity


def test_weight_similarity_is_the_cosine_of_all_weights():
    experts = torch.nn.Module()
    experts.num_experts = 4
    experts.up, experts.bias = torch.nn.Parameter(torch.randn(4, 3, 5)), torch.nn.Parameter(torch.randn(4, 3))
    vectors = torch.cat((experts.up.flatten(1), experts.bias), dim=1)
    expected = (torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=2) + 1) / 2
    torch.testing.assert_close(weight_similarity(experts), expected, atol=1e-6, rtol=0)
