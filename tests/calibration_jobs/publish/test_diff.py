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


def test_diff_of_tables(tmp_path, printed):
    def said(first, second):
        """What is printed of tables."""
        start = len(printed.file.getvalue())
        diff(str(tmp_path / first), str(tmp_path / second), uri=None, console=printed)
        _, found, text = printed.file.getvalue()[start:].rpartition("Tables")
        return found + text.partition("Held-out error")[0]

    artifact(tables=("norms", "means")).save(tmp_path / "both")
    artifact(1, tables=("norms", "means")).save(tmp_path / "other")
    artifact(tables=("means",)).save(tmp_path / "means")
    artifact().save(tmp_path / "none")
    assert said("both", "both").startswith("Tables: the same") and "Tables" not in said("none", "none")
    gap = (artifact(0, tables=("norms",)).tables[0, "norms"] - artifact(1, tables=("norms",)).tables[0, "norms"]).abs().max()
    text = said("both", "other")
    assert "norms" in text and "means" in text and gap > 0
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    norms, means = rows["norms"], rows["means"]
    assert norms[1:4] == means[1:4] == ["yes", "yes", "2"] and float(norms[4]) >= float(f"{gap:.4g}")
    assert ["norms", "yes", "no"] in [line.split() for line in said("both", "means").splitlines()]
    assert "means" not in said("both", "means"), "those that are the same are left out"
