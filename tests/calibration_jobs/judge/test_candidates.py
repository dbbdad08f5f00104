"""What is judged: thresholds, candidates and their settings."""

import torch

from sere.calibration_jobs.judge.candidates import CHAMPION, RANDOM, candidates_of, settings_of, thresholds_of
from sere.conf.schema import JudgeConfig


def test_thresholds_are_quantiles_off_the_diagonal():
    matrices = {(0, "cosine"): torch.tensor([[1, 0.2], [0.2, 1.0]]), (1, "cosine"): torch.tensor([[1, 0.6], [0.6, 1.0]])}
    assert [round(value, 6) for value in thresholds_of(matrices, "cosine", (0.0, 0.5, 1.0))] == [0, 0.2, 0.4, 0.6]


def test_candidates_and_their_settings():
    matrices = {(layer, metric): torch.rand(4, 4) for layer in (0, 1) for metric in ("cosine", "cka")}
    found = candidates_of(JudgeConfig(threshold_quantiles=(0.5,), num_random=2), matrices, {0: torch.eye(4), 1: torch.eye(4)})
    assert [candidate.name for candidate in found] == ["cosine", "cka", RANDOM, RANDOM, CHAMPION]
    assert [len(candidate.thresholds) for candidate in found] == [2, 2, 1, 1, 1]
    assert not torch.equal(found[2].matrices[0], found[3].matrices[0]), "each draw is another one"
    settings = settings_of(found, primary_top_k=(1, 2), batch_sizes=(4,))
    assert len(settings) == 14 and len(set(settings)) == 12, "the draws of the control are reported as one"
