"""How two artifacts differ."""

import pytest

from sere.calibration_jobs.publish.diff import diff
from sere.conf.errors import ConfigError
from tests.calibration_jobs.publish.artifacts import artifact


def test_diff(tmp_path, printed):
    first = artifact(0).save(tmp_path / "a" / "similarity.safetensors")
    second = artifact(1, error=0.3).save(tmp_path / "b" / "similarity.safetensors")
    diff(str(first), str(second), uri=None, console=printed)
    text = printed.file.getvalue()
    assert "data.digest" in text and "+0.1000" in text and "not comparable" in text
    largest = max((artifact(0).matrix(i, "cka") - artifact(1).matrix(i, "cka")).abs().max().item() for i in (0, 1))
    assert f"{largest:.4f}" in text
    diff(str(first), str(first), uri=None, console=printed)
    assert "Provenance: the same" in printed.file.getvalue()
    other = artifact(num_experts=5).save(tmp_path / "c" / "similarity.safetensors")
    with pytest.raises(ConfigError, match="different models"):
        diff(str(first), str(other), uri=None, console=printed)
    other = artifact(metrics=("frobenius",)).save(tmp_path / "d" / "similarity.safetensors")
    with pytest.raises(ConfigError, match="no metric in common"):
        diff(str(first), str(other), uri=None, console=printed)
