"""The run directory, on a local disk and in memory: whose it is, what is finished, and nothing twice."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.conf.errors import ConfigError
from sere.pipeline.generate.identity import read_manifest, write_manifest
from sere.pipeline.generate.parts import RunFolder
from sere.pipeline.generate.replica.answers import Answer, answer_table
from sere.pipeline.runtime.storage import Storage
from tests.conftest import ROOT

SCHEMA = pa.schema([("id", pa.int64()), ("prompt", pa.string())])


def part(rows, *, error=None, text="t"):
    """Result rows of (file, position) pairs."""
    table = pa.table(
        {
            "id": pa.array(range(len(rows)), pa.int64()),
            "prompt": pa.array(["p"] * len(rows), pa.string()),
            "source_file": pa.array([file for file, _ in rows], pa.string()),
            "source_row": pa.array([row for _, row in rows], pa.int64()),
        }
    )
    answer = Answer(error=error) if error else Answer(text, 1, 2, "stop")
    return answer_table([(0, index, answer) for index in range(len(rows))], {0: table}, SCHEMA, "id")


def open_folder(uri, *, settings=None, digest="d", overwrite=False):
    return RunFolder(Storage(str(uri)), settings or {"a": 1}, digest=digest, overwrite=overwrite)


@pytest.fixture(params=["local", "memory", "s3"])
def uri(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "run")
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}"
    import fsspec

    fsspec.filesystem("memory").store.clear()
    return "memory://bucket/run"


def test_rows_in_parts_are_finished(uri):
    with open_folder(uri) as folder:
        assert folder.scan().num_rows == 0
        folder.write_part("s1-r0-0", part([("f", 3), ("f", 1), ("g", 0)]))
        folder.write_part("s1-r1-0", part([("f", 2)], error="bad"))
    with open_folder(uri) as folder:
        finished = folder.scan()
    assert (finished.num_rows, finished.num_errors, finished.generated_tokens) == (4, 1, 6)
    assert {file: rows.tolist() for file, rows in finished.rows.items()} == {"f": [1, 2, 3], "g": [0]}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.tuples(st.sampled_from("fg"), st.integers(0, 9)), min_size=1, max_size=8, unique=True), max_size=6))
def test_a_row_in_two_parts_stays_in_the_first(tmp_path_factory, parts):
    with open_folder(tmp_path_factory.mktemp("run")) as folder:
        for number, rows in enumerate(parts):
            folder.write_part(f"{number}", part(rows, text=str(number)))
        finished = folder.scan()
        every = [row for rows in parts for row in rows]
        assert finished.num_rows == len(set(every)) and finished.num_duplicates == len(every) - len(set(every))
        kept = {}
        for table in folder.read_all(folder.parts()):
            for row in table.to_pylist():
                key = row["source_file"], row["source_row"]
                assert key not in kept
                kept[key] = int(row["generated_text"])
        assert kept == {row: min(n for n, rows in enumerate(parts) if row in rows) for row in set(every)}
        assert folder.scan().num_duplicates == 0
        for file, rows in finished.rows.items():
            assert np.array_equal(rows, sorted(position for name, position in kept if name == file))


def test_a_damaged_part_is_moved_aside_and_done_again(uri, caplog):
    with open_folder(uri) as folder:
        folder.write_part("a", part([("f", 0)]))
        folder.storage.put("results/part-b.parquet", b"PAR1 cut")
        assert folder.scan().num_rows == 1 and len(folder.parts()) == 1
        assert folder.storage.get("damaged/part-b.parquet") == b"PAR1 cut"
    assert "results/part-b.parquet is no parquet file: it is kept as damaged/part-b.parquet" in caplog.text


@pytest.mark.parametrize("still_fails", [True, False])
def test_a_storage_that_fails_is_not_damage(uri, monkeypatch, still_fails):
    """Too many open files, or a 503 of an object store: nothing that was read in part only may be called damaged."""
    with open_folder(uri) as folder:
        for number in range(3):
            folder.write_part(str(number), part([("f", number)]))

        def fails(*arguments, **options):
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(folder, "read", fails)
        if still_fails:
            monkeypatch.setattr(folder.storage, "get", fails)
            with pytest.raises(ConfigError, match=r"part-0.parquet cannot be read now \(.*Too many open files"):
                folder.scan()
        else:
            assert folder.scan().num_rows == 3
        assert len(folder.parts()) == 3
        monkeypatch.undo()
        assert folder.scan().num_rows == 3


def test_a_part_that_was_read_short_is_not_damage(uri, monkeypatch):
    with open_folder(uri) as folder:
        folder.write_part("a", part([("f", 0)]))
        whole = folder.storage.get("results/part-a.parquet")
        folder.storage.put("results/part-a.parquet", whole[:-5] + b"xxxxx")
        monkeypatch.setattr(folder.storage, "get", lambda name: whole[:100])
        with pytest.raises(ConfigError, match=f"100 of {len(whole)} bytes were read"):
            folder.scan()
        assert len(folder.parts()) == 1


def test_other_settings_are_refused_with_the_difference(uri):
    with open_folder(uri) as folder:
        folder.write_part("a", part([("f", 0)]))
    with pytest.raises(ConfigError, match=r"holds another job \(a was 1, is 2; b was None, is 'x'\).*overwrite=true"):
        open_folder(uri, settings={"a": 2, "b": "x"}).__enter__()
    with open_folder(uri, settings={"a": 2, "b": "x"}, digest="e", overwrite=True) as folder:
        assert folder.scan().num_rows == 0


def test_a_part_of_another_job_is_refused(uri):
    with open_folder(uri, digest="other") as folder:
        folder.write_part("a", part([("f", 0)]))
    with open_folder(uri) as folder, pytest.raises(ConfigError, match="belongs to another job"):
        folder.scan()


MINE = ("logs/mine.log", "sessions/mine.json", "summary.json", "results/mine.parquet", "errors.parquet")


@pytest.mark.parametrize("name", MINE[1:])
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
        with pytest.raises(ConfigError, match=r"job.json that this program did not write"):
            open_folder(uri, overwrite=overwrite).__enter__()
    assert Storage(uri).get("job.json") == content and all(Storage(uri).get(name) == b"x" for name in MINE)


def test_overwriting_removes_what_the_job_wrote_and_nothing_else(uri):
    ours = ("logs/s0001-r0002.log", "sessions/0001.json", "summary.json", "errors.parquet", "manifest.json", "run.json")
    mine = ("logs/mine.log", "sessions/mine.json", "results/mine.parquet", "notes.txt")
    with open_folder(uri) as folder:
        folder.write_part("a", part([("f", 0)]))
        for name in (*ours, *mine):
            folder.storage.put(name, b"x")
    with open_folder(uri, overwrite=True) as folder:
        assert folder.scan().num_rows == 0
        assert all(folder.storage.get(name) is None for name in ours)
        assert all(folder.storage.get(name) == b"x" for name in mine)


def test_overwriting_applies_once(uri):
    with open_folder(uri) as folder:
        folder.write_part("old", part([("f", 0)]))
    for expected in (0, 1, 2):
        # The same command each time, as after Ctrl-C.
        with open_folder(uri, overwrite=True) as folder:
            assert folder.scan().num_rows == expected
            folder.write_part(f"new-{expected}", part([("f", expected)]))
    with open_folder(uri) as folder:
        assert folder.scan().num_rows == 3, "without overwrite it goes on, too"
        write_manifest(folder, {})
    with open_folder(uri, overwrite=True) as folder:
        assert folder.scan().num_rows == 0, "what is finished is no interrupted job"
    with open_folder(uri, settings={"a": 2}, overwrite=True) as folder:
        folder.write_part("other", part([("f", 0)]))
    with open_folder(uri, overwrite=True) as folder:
        assert folder.scan().num_rows == 0, "another job's results are not this one's"


def test_overwriting_that_was_interrupted_is_completed(uri, monkeypatch):
    with open_folder(uri) as folder:
        folder.write_part("old", part([("f", 0)]))

    def interrupted(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "_clear", interrupted)
        open_folder(uri, overwrite=True).__enter__()
    with open_folder(uri) as folder:
        assert folder.scan().num_rows == 0


def test_manifest(uri):
    with open_folder(uri) as folder:
        folder.write_part("a", part([("f", 0)]))
        assert read_manifest(folder) is None
        write_manifest(folder, {"metrics": {"num_rows": 1}})
        assert read_manifest(folder)["metrics"] == {"num_rows": 1}
        folder.write_part("b", part([("f", 1)]))
        assert read_manifest(folder) is None, "other files than those declared"


@pytest.mark.parametrize("name", ["../other.parquet", "/etc/passwd", "results/../../x", "results//x", "a\\b"])
def test_paths_in_a_manifest_cannot_escape(uri, name):
    with open_folder(uri) as folder:
        folder.storage.put_json("manifest.json", {"digest": "d", "files": {name: 1}})
        with pytest.raises(ConfigError, match="leads out of"):
            read_manifest(folder)
        with pytest.raises(ValueError, match="leads out of"):
            folder.storage.put(name, b"")


def test_two_processes_do_not_share_a_folder(tmp_path):
    with open_folder(tmp_path / "run"):
        code = f"import tests.pipeline.generate.test_parts as t; t.open_folder({str(tmp_path / 'run')!r}).__enter__()"
        other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert other.returncode and "another process works in" in other.stderr


def test_a_driver_at_work_keeps_others_from_an_object_store(monkeypatch):
    import fsspec

    fsspec.filesystem("memory").store.clear()
    monkeypatch.setattr("sere.pipeline.generate.parts._HEARTBEAT_S", 0.05)
    with open_folder("memory://bucket/run") as first:
        second = open_folder("memory://bucket/run")
        original, second.storage.get = (
            second.storage.get,
            lambda name: (setattr(first, "_beaten", 0), first.beat(), original(name))[2],
        )
        with pytest.raises(ConfigError, match="another process works in"):
            second.__enter__()
    # One that was killed leaves its note, which does not change any more.
    Storage("memory://bucket/run").put_json("driver.json", {"process": "gone"})
    with open_folder("memory://bucket/run"):
        pass


def test_unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write into .*file/run"):
        open_folder(tmp_path / "file" / "run").__enter__()
    with pytest.raises(ConfigError, match="cannot be opened"):
        Storage("nosuch://x/y")
