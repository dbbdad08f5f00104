"""What an artifact says of itself."""

from sere.calibration_jobs.publish.inspect import inspect
from tests.calibration_jobs.publish.artifacts import artifact


def test_inspect_prints_manifest_and_figures(tmp_path, printed):
    file = artifact().save(tmp_path / "similarity.safetensors")
    inspect(str(file), uri=None, output=None, console=printed)
    text = printed.file.getvalue()
    for expected in ("model.digest", "data-0", "0.900", "0.2000", "0.500", "lowest error at S=2, batch 16: cosine", "3.0000"):
        assert expected in text, expected


def test_inspect_says_which_tables_there_are(tmp_path, printed):
    inspect(str(artifact().save(tmp_path / "a")), uri=None, output=None, console=printed)
    assert "No tables beside similarities" in printed.file.getvalue()
    inspect(str(artifact(tables=("norms", "means")).save(tmp_path / "b")), uri=None, output=None, console=printed)
    text = printed.file.getvalue()
    assert "bfloat16" in text and "[6, 4]" in text and "Tables of each of 2 layers" in text
