"""Row logic without a cluster: any columns survive, and bad rows look like good ones with an error."""

import datetime
import math

import pyarrow as pa
import pytest

from conf.schema import SamplingConfig
from pipeline.rows import (
    ENGINE_ERROR,
    RESULT_SCHEMA,
    TIMING_SCHEMA,
    finish_reason,
    make_postprocess,
    make_preprocess,
    pack,
    unpack,
)

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


def table(prompts):
    rows = [
        {"id": i, "prompt": prompt, "model": "m", "when": datetime.datetime(2026, 1, 1), "numbers": [0.5], "nothing": None}
        for i, prompt in enumerate(prompts)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def engine(row):
    """What the engine stage adds to a row."""
    added = {
        "generated_tokens": [5, 6, 0],
        "generated_text": "ab",
        "num_input_tokens": 4,
        "metrics": {"arrival_time": 100.0, "queued_ts": 7.0, "last_token_ts": 9.5},
    }
    return {**row, **added}


def run(prompts):
    packed = pack(table(prompts), prompt_column="prompt")
    postprocess = make_postprocess(max_tokens=8, max_model_len=64, stop_ids={0})
    rows = []
    for row in packed.to_pylist():
        if row[ENGINE_ERROR]:
            rows.append(row)
        else:
            rows.append({**postprocess(engine({**row, **make_preprocess(SamplingConfig())(row)})), ENGINE_ERROR: ""})
    return unpack(
        pa.Table.from_pylist([{k: row.get(k) for k in {k for r in rows for k in r}} for row in rows]), input_schema=SCHEMA
    )


def test_good_and_bad_rows_have_one_schema():
    result = run(["a", None, "c", ""])
    assert result.schema == pa.schema([*SCHEMA, *RESULT_SCHEMA, *TIMING_SCHEMA])
    assert result.select(SCHEMA.names).equals(table(["a", None, "c", ""]))
    assert result["error"].to_pylist() == [None, "prompt is null", None, "prompt is empty"]
    assert result["generated_text"].to_pylist() == ["ab", None, "ab", None]
    assert result["num_generated_tokens"].to_pylist() == [3, None, 3, None]
    assert result["finish_reason"].to_pylist() == ["stop", None, "stop", None]
    assert result["sere_finished"].to_pylist() == [102.5, None, 102.5, None]


@pytest.mark.parametrize("prompts", [["a", "b"], [None, None]])
def test_all_good_and_all_bad(prompts):
    assert run(prompts).schema == pa.schema([*SCHEMA, *RESULT_SCHEMA, *TIMING_SCHEMA])


def test_engine_errors_become_one_line():
    packed = pack(table(["a"]), prompt_column="prompt").drop_columns([ENGINE_ERROR])
    failed = packed.append_column(ENGINE_ERROR, pa.array(["ValueError: too\n  long " + "x" * 1000]))
    error = unpack(failed, input_schema=SCHEMA)["error"][0].as_py()
    assert error.startswith("ValueError: too long x") and len(error) == 500


def test_engine_without_times():
    row = {"sere_row": {}, "generated_tokens": [1], "generated_text": "a", "num_input_tokens": 1, "metrics": None}
    assert math.isnan(make_postprocess(max_tokens=8, max_model_len=64, stop_ids=set())(row)["sere_finished"])


@pytest.mark.parametrize(
    ("ids", "num_prompt_tokens", "expected"),
    [([5, 0], 3, "stop"), ([5, 6, 7, 0], 3, "stop"), ([5, 6, 7, 8], 3, "length"), ([5, 6], 8, "length"), ([5], 3, "stop")],
)
def test_finish_reason(ids, num_prompt_tokens, expected):
    reason = finish_reason(ids, num_prompt_tokens=num_prompt_tokens, max_tokens=4, max_model_len=10, stop_ids={0})
    assert reason == expected
