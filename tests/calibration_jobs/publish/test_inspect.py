"""What an artifact says of itself."""

from sere.calibration_jobs.publish.inspect import inspect
from tests.calibration_jobs.publish.artifacts import artifact


def test_inspect_prints_manifest_and_figures(tmp_path, printed):
    file = artifact().save(tmp_path / "similarity.safetensors")
    inspect(str(file), uri=None, output=None, console=printed)
    text = printed.file.getvalue()
    for expected in ("model.digest", "data-0", "0.900", "0.2000", "0.500", "lowest error at S=2, batch 16: cosine", "3.0000"):
        assert expected in text, expected
