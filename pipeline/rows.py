"""Row logic of generation: input rows to requests, engine outputs to result rows. Plain functions, no cluster needed.

Input columns travel through the engine stage inside one struct column, because ray.data.llm gives some names a meaning of
its own (a column `model` would be taken for a LoRA adapter).
"""

import math
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from conf.schema import SamplingConfig

# The column in which ray.data.llm notes a failed row; rows that carry it pass the engine by.
ENGINE_ERROR = "__inference_error__"
_ROW = "sere_row"
_STARTED, _FINISHED = "sere_started", "sere_finished"

RESULT_SCHEMA = pa.schema(
    [
        ("generated_text", pa.string()),
        ("num_prompt_tokens", pa.int64()),
        ("num_generated_tokens", pa.int64()),
        ("finish_reason", pa.string()),
        ("error", pa.string()),
    ]
)
TIMING_SCHEMA = pa.schema([(_STARTED, pa.float64()), (_FINISHED, pa.float64())])


def pack(table: pa.Table, *, prompt_column: str) -> pa.Table:
    """Input columns into one struct column; beside it the prompt, and why the engine cannot take it ("" if it can)."""
    prompts = table[prompt_column].cast(pa.string())
    problem = pc.if_else(
        pc.is_null(prompts),
        f"{prompt_column} is null",
        pc.if_else(pc.equal(pc.fill_null(prompts, ""), ""), f"{prompt_column} is empty", ""),
    )
    row = pa.StructArray.from_arrays([column.combine_chunks() for column in table.columns], fields=list(table.schema))
    return pa.table({_ROW: row, "prompt": prompts, ENGINE_ERROR: problem})


def make_preprocess(sampling: SamplingConfig) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The function that adds sampling parameters to a packed row."""
    parameters = asdict(sampling)

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        return {"sampling_params": dict(parameters)}

    return preprocess


def finish_reason(
    generated_ids: Collection[int],
    *,
    num_prompt_tokens: int,
    max_tokens: int,
    max_model_len: int,
    stop_ids: Collection[int],
) -> str:
    """vLLM's finish reason, which ray.data.llm does not pass on: stop if the last token ends the text, else length."""
    at_limit = len(generated_ids) >= max_tokens or num_prompt_tokens + len(generated_ids) >= max_model_len
    ended = len(generated_ids) > 0 and list(generated_ids)[-1] in stop_ids
    return "stop" if ended or not at_limit else "length"


def make_postprocess(
    *, max_tokens: int, max_model_len: int, stop_ids: Collection[int]
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The function that takes from an engine output what the result needs."""

    def postprocess(row: dict[str, Any]) -> dict[str, Any]:
        generated_ids = list(row["generated_tokens"])
        metrics = row.get("metrics") or {}
        started = metrics.get("arrival_time", math.nan)
        # Wall-clock arrival plus the engine's own, monotonic, time from queueing to the last token.
        finished = started + metrics.get("last_token_ts", math.nan) - metrics.get("queued_ts", math.nan)
        return {
            _ROW: row[_ROW],
            "generated_text": row["generated_text"],
            "num_prompt_tokens": row["num_input_tokens"],
            "num_generated_tokens": len(generated_ids),
            "finish_reason": finish_reason(
                generated_ids,
                num_prompt_tokens=row["num_input_tokens"],
                max_tokens=max_tokens,
                max_model_len=max_model_len,
                stop_ids=stop_ids,
            ),
            _STARTED: started,
            _FINISHED: finished,
        }

    return postprocess


def _short(message: str | None) -> str | None:
    """One line of an engine's error; None where there was none."""
    text = " ".join((message or "").split())
    return text[:500] or None


def unpack(table: pa.Table, *, input_schema: pa.Schema) -> pa.Table:
    """Result rows in one schema, good and bad ones alike: the input's columns, `RESULT_SCHEMA`, then `TIMING_SCHEMA`."""
    rows = table[_ROW].to_pylist()
    columns = {field.name: pa.array([row[field.name] for row in rows], field.type) for field in input_schema}
    errors = [_short(error) for error in table[ENGINE_ERROR].to_pylist()] if ENGINE_ERROR in table.column_names else []
    errors = errors or [None] * len(rows)
    failed = pa.array([error is not None for error in errors])
    for field in [*RESULT_SCHEMA, *TIMING_SCHEMA]:
        if field.name == "error":
            columns["error"] = pa.array(errors, pa.string())
        elif field.name in table.column_names:
            values = table[field.name].combine_chunks().cast(field.type)
            columns[field.name] = pc.if_else(failed, pa.scalar(None, field.type), values)
        else:
            columns[field.name] = pa.nulls(len(rows), field.type)
    return pa.table(columns, schema=pa.schema([*input_schema, *RESULT_SCHEMA, *TIMING_SCHEMA]))
