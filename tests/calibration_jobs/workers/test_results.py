"""Results on disk: whole or not at all, checked, of one job."""

import pytest
import torch

from sere.calibration_jobs.workers.results import Results
from sere.conf.errors import ConfigError
from sere.pipeline.runtime.storage import Storage

RESULT = ({"0.cka": torch.rand(3, 3, dtype=torch.float64), "1.cka": torch.rand(3, 3)}, {"num_tokens": 7})


@pytest.fixture
def results(tmp_path):
    return Results(Storage(str(tmp_path)), "digest")


@pytest.fixture
def file(tmp_path):
    """Where the result of shard-0 is."""
    return tmp_path / "results" / "shard-0.safetensors"


def is_result(found):
    tensors, info = found
    return info == RESULT[1] and all(torch.equal(tensors[key], value) for key, value in RESULT[0].items())


def test_what_is_saved_is_loaded(results):
    assert results.load("shard-0") is None
    results.save("shard-0", RESULT)
    assert is_result(results.load("shard-0")) and results.load("shard-1") is None
    results.save("none", ({}, {"a": 1}))
    assert results.load("none") == ({}, {"a": 1})


def kept(folder):
    """Contents of damaged files, none of which has replaced another."""
    return [file.read_bytes() for file in (folder / "damaged").iterdir()]


def test_a_flipped_bit_is_found(results, file, tmp_path):
    """Wherever it is: where it does no harm (in the padding of the header, say), what was saved is loaded."""
    results.save("shard-0", RESULT)
    whole, num_found = file.read_bytes(), 0
    for position in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[position] ^= 4
        file.write_bytes(flipped)
        found = results.load("shard-0")
        if found is None:
            assert not file.exists() and flipped in kept(tmp_path), "to be looked at"
            num_found += 1
        else:
            assert is_result(found)
            assert position < len(whole) - 108, "every bit of the tensors counts"
    assert num_found > 30


def test_a_cut_file_and_another_jobs_file_are_moved_aside(results, file, tmp_path, caplog):
    results.save("shard-0", RESULT)
    whole = file.read_bytes()
    for name, content, owner in (("shard-0", whole[:-8], "digest"), ("shard-1", whole, "digest"), ("shard-0", whole, "other")):
        file.with_stem(name).write_bytes(content)
        assert Results(Storage(str(tmp_path)), owner).load(name) is None
        assert not file.with_stem(name).exists() and content in kept(tmp_path)
        assert f"{name}.safetensors is not what was written there" in caplog.text


def test_a_disk_that_fails_is_not_damage(results, file, monkeypatch):
    def fails(*arguments, **options):
        raise OSError(24, "Too many open files")

    results.save("shard-0", RESULT)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"cannot be read now \(.*Too many open files"):
        patch.setattr("sere.calibration_jobs.workers.results.safe_open", fails)
        results.load("shard-0")
    assert is_result(results.load("shard-0"))
