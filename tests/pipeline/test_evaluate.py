"""Exact match and throughput over result rows."""

import math

import pyarrow as pa
import pytest

from pipeline.evaluate import ExactMatch, Throughput


def table(**columns):
    size = len(next(iter(columns.values())))
    base = {
        "generated_text": [""] * size,
        "num_prompt_tokens": [3] * size,
        "num_generated_tokens": [2] * size,
        "error": pa.nulls(size, pa.string()),
        "sere_started": [10.0] * size,
        "sere_finished": [12.0] * size,
    }
    return pa.table({**base, **columns})


def test_exact_match_by_task():
    observer = ExactMatch(reference_column="reference", task_column="task")
    observer.update(table(generated_text=["1 ", "2", None], reference=["1", "3", "4"], task=["a", "a", "b"]))
    observer.update(table(generated_text=["x", "y"], reference=["x", None], task=["b", "b"]))
    assert observer.finalize() == {"exact_match": 2 / 4, "exact_match/a": 1 / 2, "exact_match/b": 1 / 2}


def test_row_with_error_is_wrong():
    observer = ExactMatch(reference_column="reference", task_column="task")
    observer.update(table(generated_text=[None, "7"], reference=["", "7"], error=pa.array(["bad", None])))
    assert observer.finalize() == {"exact_match": 0.5}


def test_numbers_as_references():
    observer = ExactMatch(reference_column="reference", task_column="task")
    observer.update(table(generated_text=["12", "13"], reference=[12, 14]))
    assert observer.finalize() == {"exact_match": 0.5}


def test_no_references():
    observer = ExactMatch(reference_column="reference", task_column="task")
    observer.update(table(generated_text=["a"]))
    assert observer.finalize() == {}


def test_throughput_spans_all_batches():
    observer = Throughput()
    observer.update(table(sere_started=[10.0, 11.0], sere_finished=[13.0, 12.0]))
    observer.update(table(sere_started=[9.0, math.nan], sere_finished=[10.0, math.nan], error=pa.array([None, "bad"])))
    metrics = observer.finalize()
    assert metrics["num_rows"] == 4 and metrics["num_errors"] == 1
    assert metrics["generation_s"] == pytest.approx(4.0)
    assert metrics["tokens_per_s"] == pytest.approx(8 / 4)
    assert metrics["mean_generated_tokens"] == pytest.approx(8 / 3)


def test_throughput_without_times():
    observer = Throughput()
    observer.update(table(sere_started=[math.nan], sere_finished=[math.nan]))
    assert "tokens_per_s" not in observer.finalize()
