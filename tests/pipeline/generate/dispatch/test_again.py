"""How rows are tried again: a row that kills is found, and no other is given up."""

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.pipeline.generate.attempts import Attempts, forget_attempts, read_attempts
from sere.pipeline.generate.dispatch.again import next_tries, split_by_tries, without
from sere.pipeline.generate.dispatch.work import Batch
from sere.pipeline.runtime.storage import Storage
from tests.examples import examples


def rows_of(numbers, file="f"):
    numbers = list(numbers)
    return pa.table({"source_file": pa.array([file] * len(numbers), pa.string()), "source_row": pa.array(numbers, pa.int64())})


def numbers_of(table):
    return table["source_row"].to_pylist()


@settings(max_examples=examples(100))
@given(
    size=st.integers(1, 64),
    poison=st.sets(st.integers(0, 63), max_size=4),
    max_retries=st.integers(1, 3),
    accidents=st.sets(st.integers(0, 20), max_size=3),
)
def test_only_rows_that_kill_are_given_up(size, poison, max_retries, accidents):
    """`accidents`: replicas that die with whatever they have, and no row is to blame."""
    todo, answered, given_up, deaths = [Batch(rows_of(range(size)))], set(), set(), 0
    while todo:
        batch = todo.pop(0)
        numbers = numbers_of(batch.table)
        dies = poison & set(numbers)
        is_accident = not dies and deaths in accidents and not (batch.alone and len(numbers) == 1)
        if not dies and not is_accident:
            answered |= set(numbers)
            continue
        deaths += 1
        again, lost = next_tries(batch, batch.table, was_running=True, max_retries=max_retries)
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
        for number, batch in enumerate(split_by_tries(left, read_attempts(storage), max_retries=max_retries)):
            numbers = set(numbers_of(batch.table))
            if batch.hopeless:
                given_up |= numbers
                continue
            attempts.begin(number, batch.table, batch.num_tries, alone=batch.alone)
            if numbers & poison:
                break
            answered |= numbers
            attempts.end(number)
        else:
            attempts.forget()
    assert given_up == poison & set(range(size))
    forget_attempts(storage)
    assert read_attempts(storage) == {}


def test_rows_in_parts_are_not_tried_again():
    table = pa.concat_tables([rows_of([3, 4]), rows_of([3], "g")])
    assert without(table, {("f", 3), ("g", 4)}).to_pylist() == [
        {"source_file": "f", "source_row": 4},
        {"source_file": "g", "source_row": 3},
    ]
    assert next_tries(Batch(table), table.slice(0, 0), was_running=True, max_retries=3) == ([], None)


def test_a_batch_that_was_answered_is_not_charged():
    again, lost = next_tries(Batch(rows_of(range(4)), num_tries=2), rows_of([1]), was_running=False, max_retries=1)
    assert (again[0].num_tries, again[0].alone, lost) == (2, False, None)


def test_damaged_notes_are_none(tmp_path):
    storage = Storage(str(tmp_path))
    storage.put("attempts/s0001-ab-r0000.json", b"{")
    assert read_attempts(storage) == {}
