"""The calibration tests' model and text serve here too."""

from tests.calibration_jobs.conftest import make_config, texts, tiny_model

__all__ = ["make_config", "texts", "tiny_model"]
