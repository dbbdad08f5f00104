"""Scores against references."""

import pyarrow as pa
import pytest

from sere.pipeline.evaluate.scorers import SCORE_SCHEMA, exact_match, score


def table(**columns):
    size = len(next(iter(columns.values())))
    base = {"error": pa.nulls(size, pa.string()), "source_file": ["f"] * size, "source_row": list(range(size))}
    return pa.table({**base, **columns})


def scores(**columns):
    made = score(table(**columns), reference_column="reference", task_column="task")
    assert made.schema == SCORE_SCHEMA
    return made


def test_exact_match_by_task():
    made = scores(generated_text=["1 ", "2", None], reference=["1", "3", "4"], task=["a", "a", "b"])
    more = scores(generated_text=["x", "y"], reference=["x", None], task=["b", "b"])
    assert made["hit"].to_pylist() == [True, False, False] and more["hit"].to_pylist() == [True, None]
    assert exact_match(pa.concat_tables([made, more])) == pytest.approx(
        {"exact_match": 2 / 4, "exact_match/a": 1 / 2, "exact_match/b": 1 / 2}
    )


def test_row_with_error_is_wrong():
    made = scores(generated_text=[None, "7"], reference=["", "7"], error=pa.array(["bad", None]))
    assert made["hit"].to_pylist() == [False, True] and exact_match(made) == {"exact_match": 0.5}


def test_numbers_as_references():
    assert exact_match(scores(generated_text=["12", "13"], reference=[12, 14])) == {"exact_match": 0.5}


def test_no_references():
    made = scores(generated_text=["a"])
    assert made["hit"].to_pylist() == [None] and exact_match(made) == {}


def test_references_of_any_type():
    """Scores are no reason for a job to fail at its end."""
    table = pa.table({"reference": [["a"]], "task": [{"k": 1}], "generated_text": ["a"], "error": pa.nulls(1, pa.string())})
    table = table.append_column("source_file", [["f"]]).append_column("source_row", [[0]])
    (row,) = score(table, reference_column="reference", task_column="task").to_pylist()
    assert row["hit"] is False and row["task"] == '{"k": 1}'
