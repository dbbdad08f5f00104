"""The run directory, on a local disk and in memory: whose it is, what is finished, and nothing twice."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import ConfigError
from pipeline.job import read_manifest, write_manifest
from pipeline.rows import Answer, answer_table
from pipeline.run_folder import RunFolder
from pipeline.storage import Storage
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


def test_a_damaged_part_is_done_again(uri):
    with open_folder(uri) as folder:
        folder.write_part("a", part([("f", 0)]))
        folder.storage.put("results/part-b.parquet", b"PAR1 cut")
        assert folder.scan().num_rows == 1 and len(folder.parts()) == 1


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


def test_files_of_somebody_else_are_left_alone(uri):
    Storage(uri).put("results/mine.parquet", b"x")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="results of something else"):
            open_folder(uri, overwrite=overwrite).__enter__()
    assert Storage(uri).get("results/mine.parquet") == b"x"


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
        code = f"import tests.pipeline.test_run_folder as t; t.open_folder({str(tmp_path / 'run')!r}).__enter__()"
        other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert other.returncode and "another process works in" in other.stderr


def test_a_driver_at_work_keeps_others_from_an_object_store(monkeypatch):
    import fsspec

    fsspec.filesystem("memory").store.clear()
    monkeypatch.setattr("pipeline.run_folder._HEARTBEAT_S", 0.05)
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
