"""How rows are tried again: a row that kills is found, and no other is given up."""

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.pipeline.generate.attempts import Attempts, Tried, forget_attempts, read_attempts
from sere.pipeline.generate.dispatch.again import next_tries, split_by_tries
from sere.pipeline.generate.dispatch.work import Batch, Rows, cut, joined
from sere.pipeline.runtime.storage import Storage
from tests.examples import examples


def rows_of(numbers, file="f"):
    numbers = list(numbers)
    return pa.table({"source_file": pa.array([file] * len(numbers), pa.string()), "source_row": pa.array(numbers, pa.int64())})


def lying(table):
    """Rows as the dispatcher has them, but for Ray: the table itself in place of a reference."""
    return Rows(((table, 0, len(table)),)) if len(table) else Rows()


def table_of(rows):
    spans, tables = rows.arguments()
    return joined(spans, tables) if tables else rows_of([])


def numbers_of(rows):
    return table_of(rows)["source_row"].to_pylist()


@settings(max_examples=examples(100))
@given(lengths=st.lists(st.integers(1, 9), max_size=6), size=st.integers(1, 12), data=st.data())
def test_rows_are_cut_and_joined(lengths, size, data):
    """Whatever the tables are that they lie in."""
    ends = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    blocks = [lying(rows_of(range(first, last))) for first, last in pairwise(ends)]
    batches = list(cut(blocks, size))
    assert [number for batch in batches for number in numbers_of(batch)] == list(range(sum(lengths)))
    assert all(len(batch) == size for batch in batches[:-1]) and all(0 < len(batch) <= size for batch in batches)
    whole = sum(blocks, Rows())
    start = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.none() | st.integers(0, len(whole)))
    expected = list(range(len(whole)))[start : None if length is None else start + length]
    assert numbers_of(whole.slice(start, length)) == expected and len(whole.slice(start, length)) == len(expected)


@settings(max_examples=examples(100))
@given(
    size=st.integers(1, 64),
    poison=st.sets(st.integers(0, 63), max_size=4),
    max_retries=st.integers(1, 3),
    accidents=st.sets(st.integers(0, 20), max_size=3),
)
def test_only_rows_that_kill_are_given_up(size, poison, max_retries, accidents):
    """`accidents`: replicas that die with whatever they have, and no row is to blame."""
    todo, answered, given_up, deaths = [Batch(lying(rows_of(range(size))))], set(), set(), 0
    while todo:
        batch = todo.pop(0)
        numbers = numbers_of(batch.rows)
        dies = poison & set(numbers)
        is_accident = not dies and deaths in accidents and not (batch.alone and len(numbers) == 1)
        if not dies and not is_accident:
            answered |= set(numbers)
            continue
        deaths += 1
        again, lost = next_tries(batch, batch.rows, was_running=True, max_retries=max_retries)
        todo += again
        given_up |= set(numbers_of(lost)) if lost is not None else set()
        assert deaths < 200
    assert given_up == poison & set(range(size)) and answered == set(range(size)) - poison


@settings(max_examples=examples(60))
@given(size=st.integers(1, 64), poison=st.sets(st.integers(0, 63), max_size=2), max_retries=st.integers(0, 3))
def test_a_row_that_kills_every_session_is_found(tmp_path_factory, size, poison, max_retries):
    """Sessions of one batch at a time; a row that kills takes the driver with it."""
    storage = Storage(str(tmp_path_factory.mktemp("run")))
    answered, given_up, sessions = set(), set(), 0
    while len(answered | given_up) < size:
        sessions += 1
        assert sessions < 60
        left = rows_of(number for number in range(size) if number not in answered | given_up)
        attempts = Attempts(storage, f"s{sessions}-0-r0")
        for number, batch in enumerate(split_by_tries(lying(left), left, read_attempts(storage, {}), max_retries=max_retries)):
            numbers = set(numbers_of(batch.rows))
            if batch.hopeless:
                given_up |= numbers
                continue
            attempts.begin(number, table_of(batch.rows), batch.num_tries, alone=batch.alone)
            if numbers & poison:
                break
            answered |= numbers
            attempts.end(number)
        else:
            attempts.forget()
    assert given_up == poison & set(range(size))
    forget_attempts(storage)
    assert read_attempts(storage, {}) == {}


def test_nothing_left_is_not_tried_again():
    assert next_tries(Batch(lying(rows_of([1]))), Rows(), was_running=True, max_retries=3) == ([], None)


def test_a_batch_that_was_answered_is_not_charged():
    again, lost = next_tries(
        Batch(lying(rows_of(range(4))), num_tries=2), lying(rows_of([1])), was_running=False, max_retries=1
    )
    assert (again[0].num_tries, again[0].alone, lost) == (2, False, None)


def test_rows_that_were_written_are_nobodys_fault(tmp_path):
    storage = Storage(str(tmp_path))
    attempts = Attempts(storage, "s0001-ab-r0000")
    attempts.begin(0, pa.concat_tables([rows_of([3, 4, 5, 9]), rows_of([1], "g")]), 2, alone=False)
    found = read_attempts(storage, {"f": np.array([0, 4, 9]), "g": np.array([1])})
    assert found == {"f": {3: Tried(3, 0), 5: Tried(3, 0)}}


def test_batches_that_begin_at_once_are_all_noted(tmp_path):
    storage = Storage(str(tmp_path))
    storage.put("attempts/mine.txt", b"mine")
    attempts = Attempts(storage, "s0001-ab-r0000")
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda number: attempts.begin(number, rows_of([number]), 0, alone=False), range(64)))
    assert set(read_attempts(storage, {})["f"]) == set(range(64))
    forget_attempts(storage)
    assert list(storage.sizes("attempts")) == ["attempts/mine.txt"], "of another name, so somebody else's"


def test_batches_that_wait_for_a_slow_storage_are_noted_together(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path))
    written, put = [], storage.put_json

    def slow(name, values):
        if not written:
            time.sleep(0.5)
        put(name, values)
        written.append(len(values))

    monkeypatch.setattr(storage, "put_json", slow)
    attempts = Attempts(storage, "s0001-ab-r0000")

    def begin(number):
        attempts.begin(number, rows_of([number]), 0, alone=False)
        assert number in read_attempts(storage, {})["f"], "before its rows are tried"

    with ThreadPoolExecutor(9) as threads:
        list(threads.map(begin, range(9)))
    assert len(written) <= 3 and written[-1] == 9


def test_damaged_notes_are_none(tmp_path):
    storage = Storage(str(tmp_path))
    storage.put("attempts/s0001-ab-r0000.json", b"{")
    assert read_attempts(storage, {}) == {}
