"""Results on disk: whole or not at all, checked, of one job, of one process."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from sere.calibration_jobs.workers.results import DamagedResult, JobFolder
from sere.conf.errors import ConfigError

SETTINGS = {"model": "m", "metrics": ("a", "b"), "length": 4}
RESULT = ({"0.cka": torch.rand(3, 3, dtype=torch.float64), "1.cka": torch.rand(3, 3)}, {"num_tokens": 7})


@pytest.fixture
def folder(tmp_path):
    with JobFolder(tmp_path / "job", SETTINGS) as opened:
        yield opened


def test_what_is_saved_is_loaded(folder):
    folder.save("shard-0", RESULT)
    tensors, info = folder.load("shard-0")
    assert folder.has("shard-0") and not folder.has("shard-1")
    assert info == RESULT[1] and all(torch.equal(tensors[key], value) for key, value in RESULT[0].items())
    folder.save("none", ({}, {"a": 1}))
    assert folder.load("none") == ({}, {"a": 1})
    folder.note("finished", {"version": "3"})
    assert folder.noted("finished") == {"version": "3"} and folder.noted("run") is None


def file_of(folder, name="shard-0"):
    return folder.path / "results" / f"{name}.safetensors"


def test_a_flipped_bit_is_found(folder):
    """Wherever it is: where it does no harm (in the padding of the header, say), what was saved is loaded."""
    folder.save("shard-0", RESULT)
    whole, num_found = file_of(folder).read_bytes(), 0
    for position in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[position] ^= 4
        file_of(folder).write_bytes(flipped)
        try:
            tensors, info = folder.load("shard-0")
        except DamagedResult as error:
            assert "shard-0.safetensors" in str(error)
            num_found += 1
        else:
            assert info == RESULT[1] and all(torch.equal(tensors[key], value) for key, value in RESULT[0].items())
            assert position < len(whole) - 108, "every bit of the tensors counts"
    assert num_found > 30


def test_a_cut_file_and_another_jobs_file_are_found(folder, tmp_path):
    folder.save("shard-0", RESULT)
    whole = file_of(folder).read_bytes()
    file_of(folder).write_bytes(whole[:-8])
    with pytest.raises(DamagedResult, match="cannot be read"):
        folder.load("shard-0")
    file_of(folder, "shard-1").write_bytes(whole)
    with pytest.raises(DamagedResult, match="checksum"):
        folder.load("shard-1")
    with JobFolder(tmp_path / "other", {**SETTINGS, "length": 5}) as other:
        file_of(other).write_bytes(whole)
        with pytest.raises(DamagedResult, match="checksum"):
            other.load("shard-0")


def test_other_settings_are_refused_and_named(tmp_path):
    with JobFolder(tmp_path, SETTINGS) as folder:
        folder.save("shard-0", RESULT)
    with pytest.raises(ConfigError, match=r"holds another job \(length was 4, is 5\).*overwrite=true"):
        JobFolder(tmp_path, {**SETTINGS, "length": 5}).__enter__()
    with JobFolder(tmp_path, SETTINGS) as folder:
        assert folder.has("shard-0"), "the same settings go on"
    with JobFolder(tmp_path, {**SETTINGS, "length": 5}, overwrite=True) as folder:
        assert not folder.has("shard-0")


def test_a_write_that_was_cut_off_leaves_nothing(tmp_path):
    with JobFolder(tmp_path, SETTINGS) as folder:
        (folder.path / "results" / ".shard-0.safetensors.123").write_text("half")
    with JobFolder(tmp_path, SETTINGS) as folder:
        assert list((folder.path / "results").iterdir()) == []


def test_one_process_at_a_time_and_a_killed_one_does_not_hold_on(tmp_path):
    code = (
        "import sys, time\nfrom sere.calibration_jobs.workers.results import JobFolder\nfrom pathlib import Path\n"
        f"with JobFolder(Path({str(tmp_path)!r}), {{'model': 'm'}}):\n    print('open', flush=True)\n    time.sleep(100)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "open\n"
    with pytest.raises(ConfigError, match="another process works in"):
        JobFolder(tmp_path, {"model": "m"}).__enter__()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.1)
    with JobFolder(tmp_path, {"model": "m"}):
        pass


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write into .*file/calibration .*choose another output"):
        JobFolder(tmp_path / "file" / "calibration", SETTINGS).__enter__()
