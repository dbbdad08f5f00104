"""Answers become rows of one schema, whatever columns the input has."""

import datetime

import pyarrow as pa
import pytest

from sere.pipeline.generate.replica.answers import RESULT_SCHEMA, Answer, answer_table, result_schema, with_ids

SCHEMA = pa.schema(
    [
        ("id", pa.int32()),
        ("prompt", pa.string()),
        ("model", pa.string()),
        ("when", pa.timestamp("ms")),
        ("numbers", pa.list_(pa.float32())),
        ("nothing", pa.null()),
    ]
)


def inputs(size):
    row = {"prompt": "p", "model": "m", "when": datetime.datetime(2026, 1, 1), "numbers": [0.5], "nothing": None}
    table = pa.Table.from_pylist([{"id": number, **row} for number in range(size)], schema=SCHEMA)
    names = pa.array(["f"] * size, pa.string())
    return table.append_column("source_file", names).append_column("source_row", pa.array(range(size), pa.int64()))


GOOD, BAD = Answer("ab", 4, 3, "stop"), Answer(error="ValueError: too\n  long " + "x" * 1000)


@pytest.mark.parametrize("answers", [[GOOD, BAD, GOOD], [GOOD], [BAD]])
def test_good_and_bad_rows_have_one_schema(answers):
    tables = {7: inputs(5), 9: inputs(2)}
    rows = [(9, 1, answers[0]), *((7, index + 3, answer) for index, answer in enumerate(answers[1:]))]
    made = answer_table(rows, tables, SCHEMA, "id")
    assert made.schema == pa.schema([*SCHEMA, *RESULT_SCHEMA]) == result_schema(SCHEMA, "id")
    assert made["source_row"].to_pylist() == [index for _, index, _ in rows]
    for row, answer in zip(made.to_pylist(), answers, strict=True):
        assert row["id"] == row["source_row"] and row["when"] == datetime.datetime(2026, 1, 1) and row["numbers"] == [0.5]
        assert row["generated_text"] == answer.generated_text and (row["error"] is None) == (answer.error is None)


def test_errors_become_one_line():
    (row,) = answer_table([(0, 0, BAD)], {0: inputs(1)}, SCHEMA, "id").to_pylist()
    assert row["error"].startswith("ValueError: too long x") and len(row["error"]) == 500
    assert row["num_prompt_tokens"] is None


def test_missing_ids_are_made():
    table = inputs(2)
    assert with_ids(table, "id") is table
    made = with_ids(table.drop_columns(["id"]), "id")
    assert made.column_names[0] == "id" and made["id"].to_pylist() == ["f#0", "f#1"]
    some = table.set_column(0, "id", pa.array(["a", None]))
    assert with_ids(some, "id")["id"].to_pylist() == ["a", "f#1"]
    numbers = table.set_column(0, "id", pa.array([1, None], pa.int32()))
    assert with_ids(numbers, "id")["id"].to_pylist() == [1, None], "there is no number to make"
