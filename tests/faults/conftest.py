"""The calibration tests' model, text and cluster serve here too."""

from tests.calibration_jobs.conftest import cluster, make_config, texts, tiny_model

__all__ = ["cluster", "make_config", "texts", "tiny_model"]
