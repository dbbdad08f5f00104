"""Scores against references."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sere.pipeline.evaluate.scorers import EXACT_MATCH, SCORE_SCHEMA, Scores, with_scores


def table(**columns):
    size = len(next(iter(columns.values())))
    base = {"error": pa.nulls(size, pa.string()), "source_file": ["f"] * size, "source_row": list(range(size))}
    return pa.table({**base, **columns})


def scored(**columns):
    return with_scores(table(**columns), "reference")


def averages(tmp_path, *tables):
    scores = Scores(tmp_path / "scores.parquet", "task")
    for one in tables:
        scores.add(one)
    found = scores.close()
    assert pq.read_schema(tmp_path / "scores.parquet") == SCORE_SCHEMA
    assert pq.read_metadata(tmp_path / "scores.parquet").num_rows == sum(map(len, tables))
    return found


def test_exact_match_by_task(tmp_path):
    made = scored(generated_text=["1 ", "2", None], reference=["1", "3", "4"], task=["a", "a", "b"])
    more = scored(generated_text=["x", "y"], reference=["x", None], task=["b", "b"])
    assert made[EXACT_MATCH].to_pylist() == [True, False, False] and more[EXACT_MATCH].to_pylist() == [True, None]
    found = averages(tmp_path, made, more)
    assert found == pytest.approx({"exact_match": 2 / 4, "exact_match/a": 1 / 2, "exact_match/b": 1 / 2})
    assert list(found) == sorted(found)


def test_row_with_error_is_wrong(tmp_path):
    made = scored(generated_text=[None, "7"], reference=["", "7"], error=pa.array(["bad", None]))
    assert made[EXACT_MATCH].to_pylist() == [False, True] and averages(tmp_path, made) == {"exact_match": 0.5}


def test_numbers_as_references():
    assert scored(generated_text=["12", "13"], reference=[12, 14])[EXACT_MATCH].to_pylist() == [True, False]


def test_no_reference_in_any_row(tmp_path):
    assert averages(tmp_path, scored(generated_text=["a"], reference=pa.nulls(1, pa.string()))) == {}


def test_scores_are_made_anew():
    made = scored(generated_text=["1", "2"], reference=["1", "1"], other=["2", "2"])
    again = with_scores(made, "other")
    assert again[EXACT_MATCH].to_pylist() == [False, True] and again.column_names == made.column_names
    assert with_scores(again, "reference").equals(made, check_metadata=True)
    none = with_scores(again, "")
    assert EXACT_MATCH not in none.column_names and not none.schema.metadata
    # Of the input, and none of ours.
    mine = table(generated_text=["1"], exact_match=[7])
    assert with_scores(mine, "")[EXACT_MATCH].to_pylist() == [7]


def test_references_of_any_type(tmp_path):
    """Scores are no reason for a job to fail at its end."""
    made = scored(reference=[["a"]], task=[{"k": 1}], generated_text=["a"])
    assert made[EXACT_MATCH].to_pylist() == [False]
    assert averages(tmp_path, made) == {"exact_match": 0.0, 'exact_match/{"k": 1}': 0.0}
