"""Parts on every kind of storage: which rows are finished, nothing twice, nothing lost."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.conf.errors import ConfigError, TryAgainError
from sere.pipeline.generate.parts import Parts
from sere.pipeline.generate.record import next_session, read_manifest, read_sessions, sweep, write_manifest
from sere.pipeline.generate.replica.answers import Answer, answer_table
from sere.pipeline.runtime.storage import Storage
from tests.examples import examples

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


def open_parts(uri, digest="d"):
    return Parts(Storage(str(uri)), digest)


def test_rows_in_parts_are_finished(uri):
    parts = open_parts(uri)
    assert parts.scan().num_rows == 0
    parts.write("s1-r0-0", part([("f", 3), ("f", 1), ("g", 0)]))
    parts.write("s1-r1-0", part([("f", 2)], error="bad"))
    parts = open_parts(uri)
    finished = parts.scan()
    assert (finished.num_rows, finished.num_errors, finished.generated_tokens) == (4, 1, 6)
    assert {file: rows.tolist() for file, rows in finished.rows.items()} == {"f": [1, 2, 3], "g": [0]}


@settings(max_examples=examples(30), deadline=None)
@given(st.lists(st.lists(st.tuples(st.sampled_from("fg"), st.integers(0, 9)), min_size=1, max_size=8, unique=True), max_size=6))
def test_a_row_in_two_parts_stays_in_the_first(tmp_path_factory, written):
    parts = open_parts(tmp_path_factory.mktemp("run"))
    for number, rows in enumerate(written):
        parts.write(f"{number}", part(rows, text=str(number)))
    finished = parts.scan()
    every = [row for rows in written for row in rows]
    assert finished.num_rows == len(set(every)) and finished.num_duplicates == len(every) - len(set(every))
    kept = {}
    for table in parts.read_all(parts.names()):
        for row in table.to_pylist():
            key = row["source_file"], row["source_row"]
            assert key not in kept
            kept[key] = int(row["generated_text"])
    assert kept == {row: min(n for n, rows in enumerate(written) if row in rows) for row in set(every)}
    assert parts.scan().num_duplicates == 0
    for file, rows in finished.rows.items():
        assert np.array_equal(rows, sorted(position for name, position in kept if name == file))


def test_a_damaged_part_is_moved_aside_and_done_again(uri, caplog):
    parts = open_parts(uri)
    parts.write("a", part([("f", 0)]))
    parts.storage.put("results/part-b.parquet", b"PAR1 cut")
    assert parts.scan().num_rows == 1 and len(parts.names()) == 1
    assert parts.storage.get("damaged/part-b.parquet") == b"PAR1 cut"
    assert "results/part-b.parquet is no parquet file: it is kept as damaged/part-b.parquet" in caplog.text


@pytest.mark.parametrize("still_fails", [True, False])
def test_a_storage_that_fails_is_not_damage(uri, monkeypatch, still_fails):
    """Too many open files, or a 503 of an object store: nothing that was read in part only may be called damaged."""
    parts = open_parts(uri)
    for number in range(3):
        parts.write(str(number), part([("f", number)]))

    def fails(*arguments, **options):
        raise OSError(24, "Too many open files")

    parts = Parts(Storage(str(uri), patience_s=0.1), "d")
    content = {parts.storage.locate(name): parts.storage.get(name) for name in parts.names()}
    monkeypatch.setattr(parts.storage.filesystem, "open", fails)
    if still_fails:
        monkeypatch.setattr(parts.storage.filesystem, "cat_file", fails)
        with pytest.raises(ConfigError, match=r"part-0.parquet cannot be read now \(.*Too many open files"):
            parts.scan()
    else:
        monkeypatch.setattr(parts.storage.filesystem, "cat_file", lambda place: content[place])
        assert parts.scan().num_rows == 3
        assert [len(table) for table in parts.read_all(parts.names())] == [1, 1, 1]
    assert len(parts.names()) == 3
    monkeypatch.undo()
    assert parts.scan().num_rows == 3


def test_a_part_that_was_read_short_is_not_damage(uri, monkeypatch):
    parts = open_parts(uri)
    parts.write("a", part([("f", 0)]))
    whole = parts.storage.get("results/part-a.parquet")
    parts.storage.put("results/part-a.parquet", whole[:-5] + b"xxxxx")
    monkeypatch.setattr(parts.storage, "get", lambda name: whole[:100])
    with pytest.raises(ConfigError, match=f"100 of {len(whole)} bytes were read"):
        parts.scan()
    assert len(parts.names()) == 1


def test_a_part_of_another_job_is_refused(uri):
    parts = open_parts(uri, digest="other")
    parts.write("a", part([("f", 0)]))
    parts = open_parts(uri)
    with pytest.raises(ConfigError, match="belongs to another job"):
        parts.scan()


def test_manifest(uri):
    parts = open_parts(uri)
    parts.write("a", part([("f", 0)]))
    assert read_manifest(parts) is None
    write_manifest(parts, {"metrics": {"num_rows": 1}}, parts.names())
    assert read_manifest(parts)["metrics"] == {"num_rows": 1}
    parts.write("late", part([("f", 0)], text="late"))
    parts.storage.put("results/mine.parquet", b"x")
    manifest = read_manifest(parts)
    assert manifest is not None, "what a lost replica writes later is no part of the results"
    sweep(parts, manifest)
    assert list(parts.storage.sizes("results")) == ["results/mine.parquet", "results/part-a.parquet"]
    parts.write("a", part([("f", 0)], text="another"))
    assert read_manifest(parts) is None, "another file than the one declared"
    parts.storage.remove("results/part-a.parquet")
    assert read_manifest(parts) is None
    with pytest.raises(TryAgainError, match=r"part-a.parquet is gone.*run the same command again"):
        write_manifest(parts, {}, ["results/part-a.parquet"])


def test_rows_that_others_wrote_are_counted(uri):
    parts, others = open_parts(uri), open_parts(uri)
    parts.write("a", part([("f", 0)]))
    assert parts.count(parts.names()) == 1
    whole, size = others.write("b", part([("f", 1), ("f", 2)]))
    assert parts.count([whole, "results/part-none.parquet"]) == 2 and parts.storage.sizes("results")[whole] == size


def test_a_row_twice_in_one_part_keeps_one_answer(uri):
    parts = open_parts(uri)
    parts.write("a", part([("f", 0), ("f", 1), ("f", 0), ("f", 0)]))
    finished = parts.scan()
    assert (finished.num_rows, finished.num_duplicates) == (2, 2)
    assert parts.read(parts.names()[0])["source_row"].to_pylist() == [0, 1]


@settings(max_examples=examples(30), deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=6), max_size=5))
def test_an_answer_is_never_lost_to_an_error(tmp_path_factory, written):
    parts = open_parts(tmp_path_factory.mktemp("run"))
    for number, rows in enumerate(written):
        for failed in (False, True):
            some = [("f", row) for row, error in rows if error == failed]
            if not some:
                continue
            parts.write(f"{number}-{failed}", part(some, error="bad" if failed else None, text=f"{number}"))
    every = {row for rows in written for row, _ in rows}
    good = {row for rows in written for row, failed in rows if not failed}
    tried_again = parts.scan(errors_count=False)
    assert tried_again.rows.get("f", np.array([])).tolist() == sorted(good) and tried_again.num_errors == 0
    finished = parts.scan()
    assert finished.num_rows == len(every) and finished.num_errors == len(every - good)
    kept = {row["source_row"]: row["error"] for table in parts.read_all(parts.names()) for row in table.to_pylist()}
    assert {row for row, error in kept.items() if error is None} == good and set(kept) == every


def test_sessions_have_numbers_of_their_own(uri):
    storage = Storage(uri)
    assert next_session(storage) == 1
    storage.put("results/part-s0003-r0000-000000.parquet", b"")
    assert next_session(storage) == 4, "a session whose own file is lost"
    storage.put("results/part-ordered-ab-000009.parquet", b"")
    storage.put("logs/s0005-0a1b2c-r0007.log", b"")
    assert next_session(storage) == 6
    storage.put("sessions/0006.json", b"")
    storage.put_json("sessions/0002.json", {"number": 2, "elapsed_s": 3.0, "of_a_later_version": 1})
    assert next_session(storage) == 7
    assert [(session.number, session.elapsed_s) for session in read_sessions(storage)] == [(2, 3.0)]


@pytest.mark.parametrize("name", ["../other.parquet", "/etc/passwd", "results/../../x", "results//x", "a\\b"])
def test_paths_in_a_manifest_cannot_escape(uri, name):
    parts = open_parts(uri)
    parts.storage.put_json("manifest.json", {"digest": "d", "files": {name: 1}})
    with pytest.raises(ConfigError, match="leads out of"):
        read_manifest(parts)
    with pytest.raises(ValueError, match="leads out of"):
        parts.storage.put(name, b"")
