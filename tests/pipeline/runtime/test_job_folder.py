"""A job's folder on every kind of storage: whose it is, who works in it, what is thrown away."""

import subprocess
import sys

import pytest

from sere.conf.errors import ConfigError
from sere.pipeline.generate.identity import GENERATE
from sere.pipeline.runtime.job_folder import JobFolder
from sere.pipeline.runtime.storage import Storage
from tests.conftest import ROOT


def open_folder(uri, *, settings=None, overwrite=False, free=()):
    return JobFolder(Storage(str(uri)), GENERATE, settings or {"a": 1}, overwrite=overwrite, free=free)


def write(folder, name):
    folder.storage.put(f"results/part-{name}.parquet", b"x")


def parts(folder):
    return sum(name.startswith("results/part-") for name in folder.storage.sizes("results"))


MINE = ("logs/mine.log", "sessions/mine.json", "summary.json", "results/mine.parquet", "errors.parquet")


def test_other_settings_are_refused_with_the_difference(uri):
    with open_folder(uri) as folder:
        write(folder, "a")
    with pytest.raises(ConfigError, match=r"holds another job \(a was 1, is 2; b was None, is 'x'\).*overwrite=true"):
        open_folder(uri, settings={"a": 2, "b": "x"}).__enter__()
    with open_folder(uri, settings={"a": 2, "b": "x"}, overwrite=True) as folder:
        assert parts(folder) == 0


def test_a_job_goes_on_under_other_settings_that_are_free(uri):
    with open_folder(uri, settings={"a": 1, "b": 1, "c.d": 1}) as folder:
        write(folder, "a")
    for settings in ({"a": 1, "b": 2, "c": {}}, {"a": 1, "c.d": 3}):
        with open_folder(uri, settings=settings, free=("b", "c.d")) as again:
            assert parts(again) == 1 and again.digest == folder.digest
    with pytest.raises(ConfigError, match=r"another job \(a was 1, is 2\)"):
        open_folder(uri, settings={"a": 2, "b": 2}, free=("b", "c.d")).__enter__()
    with pytest.raises(ConfigError, match=r"another job \(b was 1, is 2; c.d was 1, is None\)"):
        open_folder(uri, settings={"a": 1, "b": 2}).__enter__()


@pytest.mark.parametrize("name", [*MINE[2:], "sessions/0001.json", "manifest.json"])
def test_files_of_somebody_else_are_refused(uri, name):
    Storage(uri).put(name, b"x")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=f"has {name}, which this program did not write"):
            open_folder(uri, overwrite=overwrite).__enter__()
    assert Storage(uri).get(name) == b"x" and Storage(uri).get("job.json") is None


@pytest.mark.parametrize("content", [b'{"my": "job"}', b"[1]", b"no JSON", b'{"sere": "calibrate", "settings": {}}'])
def test_a_job_file_of_somebody_else_is_refused(uri, content):
    Storage(uri).put("job.json", content)
    for name in MINE:
        Storage(uri).put(name, b"x")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"job\.json that `sere generate` did not write"):
            open_folder(uri, overwrite=overwrite).__enter__()
    assert Storage(uri).get("job.json") == content and all(Storage(uri).get(name) == b"x" for name in MINE)


def test_overwriting_removes_what_the_job_wrote_and_nothing_else(uri):
    ours = ("logs/s0001-r0002.log", "sessions/0001.json", "summary.json", "errors.parquet", "manifest.json", "run.json")
    mine = ("logs/mine.log", "sessions/mine.json", "results/mine.parquet", "notes.txt")
    with open_folder(uri) as folder:
        write(folder, "a")
        for name in (*ours, *mine):
            folder.storage.put(name, b"x")
    with open_folder(uri, overwrite=True) as folder:
        assert parts(folder) == 0
        assert all(folder.storage.get(name) is None for name in ours)
        assert all(folder.storage.get(name) == b"x" for name in mine)


def test_overwriting_applies_once(uri):
    with open_folder(uri) as folder:
        write(folder, "old")
    for expected in (0, 1, 2):
        # The same command each time, as after Ctrl-C.
        with open_folder(uri, overwrite=True) as folder:
            assert parts(folder) == expected
            write(folder, f"new-{expected}")
    with open_folder(uri) as folder:
        assert parts(folder) == 3, "without overwrite it goes on, too"
        folder.storage.put("manifest.json", b"{}")
    with open_folder(uri, overwrite=True) as folder:
        assert parts(folder) == 0, "what is finished is no interrupted job"
    with open_folder(uri, settings={"a": 2}, overwrite=True) as folder:
        write(folder, "other")
    with open_folder(uri, overwrite=True) as folder:
        assert parts(folder) == 0, "another job's results are not this one's"


def test_overwriting_that_was_interrupted_is_completed(uri, monkeypatch):
    with open_folder(uri) as folder:
        write(folder, "old")

    def interrupted(job, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(JobFolder, "_written", interrupted)
        open_folder(uri, overwrite=True).__enter__()
    with open_folder(uri) as folder:
        assert parts(folder) == 0


def test_two_processes_do_not_share_a_folder(tmp_path):
    with open_folder(tmp_path / "run"):
        code = f"import tests.pipeline.runtime.test_job_folder as t; t.open_folder({str(tmp_path / 'run')!r}).__enter__()"
        other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert other.returncode and "another process works in" in other.stderr


def test_unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write into .*file/run"):
        open_folder(tmp_path / "file" / "run").__enter__()
    with pytest.raises(ConfigError, match="cannot be opened"):
        Storage("nosuch://x/y")


def test_what_was_half_written_when_somebody_was_killed_is_removed(tmp_path):
    with open_folder(tmp_path / "run") as folder:
        write(folder, "a")
    unfinished = [
        "results/.part-b.parquet.0123456789abcdef0123456789abcdef",
        ".summary.json.0123456789abcdef0123456789abcdef",
        "sessions/.0001.json.0123456789abcdef0123456789abcdef",
    ]
    others = [".mine", "results/.mine.parquet", "mine/.part-b.parquet.0123456789abcdef0123456789abcdef"]
    for name in (*unfinished, *others):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match="holds another job"):
        open_folder(tmp_path / "run", settings={"a": 2}).__enter__()
    assert all((tmp_path / "run" / name).exists() for name in unfinished)
    with open_folder(tmp_path / "run"):
        pass
    assert not any((tmp_path / "run" / name).exists() for name in unfinished)
    assert all((tmp_path / "run" / name).exists() for name in (*others, "results/part-a.parquet"))


def test_a_killed_process_does_not_hold_on(tmp_path):
    code = (
        "import time, tests.pipeline.runtime.test_job_folder as t\n"
        f"with t.open_folder({str(tmp_path / 'run')!r}):\n    print('open', flush=True)\n    time.sleep(100)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "open\n"
    with pytest.raises(ConfigError, match="another process works in"):
        open_folder(tmp_path / "run").__enter__()
    process.kill()
    process.wait()
    with open_folder(tmp_path / "run"):
        pass


def test_a_calibration_job_has_a_folder_of_its_own_kind(tmp_path):
    from sere.calibration_jobs.identity import CALIBRATE

    with open_folder(tmp_path / "run"):
        pass
    with pytest.raises(ConfigError, match=r"job\.json that `sere calibrate` did not write"):
        JobFolder(Storage(str(tmp_path / "run")), CALIBRATE, {}, overwrite=True).__enter__()
    folder = JobFolder(Storage(str(tmp_path / "calibration")), CALIBRATE, {"a": (1, 2)}, overwrite=False)
    with folder:
        folder.storage.put("results/shard.safetensors", b"x")
    with JobFolder(folder.storage, CALIBRATE, {"a": [1, 2]}, overwrite=False):
        assert folder.storage.get("results/shard.safetensors") == b"x", "a tuple is what JSON makes of it"
    with JobFolder(folder.storage, CALIBRATE, {"a": [1]}, overwrite=True):
        assert folder.storage.get("results/shard.safetensors") is None
