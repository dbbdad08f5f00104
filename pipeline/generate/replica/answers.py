"""Answers as result rows: the input's columns, then `RESULT_SCHEMA`, one schema for good and bad rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from sere.pipeline.data.source import PLACE
from sere.pipeline.evaluate.scorers import with_scores

RESULT_SCHEMA = pa.schema(
    [
        ("generated_text", pa.string()),
        ("num_prompt_tokens", pa.int64()),
        ("num_generated_tokens", pa.int64()),
        ("finish_reason", pa.string()),
        ("error", pa.string()),
        *PLACE,
    ]
)
_MAX_ERROR = 500


@dataclass(frozen=True)
class Answer:
    """What became of a row. With an error all else is None."""

    generated_text: str | None = None
    num_prompt_tokens: int | None = None
    num_generated_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None


def result_schema(input_schema: pa.Schema, id_column: str) -> pa.Schema:
    """The columns of a result; the id comes first where the input has none."""
    made = [] if id_column in input_schema.names else [pa.field(id_column, pa.string())]
    return pa.schema([*made, *input_schema, *RESULT_SCHEMA])


def with_ids(table: pa.Table, id_column: str) -> pa.Table:
    """Fill missing ids with FILE#ROW. A null in a column of numbers stays null: there is no number to put there."""
    made = pc.binary_join_element_wise(table["source_file"], pc.cast(table["source_row"], pa.string()), "#")
    if id_column not in table.column_names:
        return table.add_column(0, id_column, made)
    index = table.column_names.index(id_column)
    ids = table[id_column]
    if ids.null_count and (pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)):
        return table.set_column(index, table.schema.field(index), pc.coalesce(ids, made.cast(ids.type)))
    return table


def answer_table(
    rows: Sequence[tuple[int, int, Answer]],
    tables: Mapping[int, pa.Table],
    input_schema: pa.Schema,
    id_column: str,
    references: str = "",
) -> pa.Table:
    """Result rows in the order of `rows`.

    Args:
        rows: Number of a table, row in it, and the answer.
        tables: By number, with the input's columns, `source_file` and `source_row`.
        input_schema: The input's columns.
        id_column: See `with_ids`.
        references: See `with_scores`.
    """
    wanted = [*input_schema.names, "source_file", "source_row"]
    numbers = sorted({number for number, _, _ in rows})
    starts, start = {}, 0
    for number in numbers:
        starts[number] = start
        start += len(tables[number])
    joined = pa.concat_tables([tables[number].select(wanted) for number in numbers])
    inputs = with_ids(joined.take(pa.array([starts[number] + index for number, index, _ in rows])), id_column)
    answers = [answer for _, _, answer in rows]
    columns = {name: inputs[name] for name in inputs.column_names}
    for name in ("generated_text", "num_prompt_tokens", "num_generated_tokens", "finish_reason"):
        columns[name] = pa.array([getattr(answer, name) for answer in answers], RESULT_SCHEMA.field(name).type)
    columns["error"] = pa.array([_short(answer.error) for answer in answers], pa.string())
    schema = result_schema(input_schema, id_column)
    return with_scores(pa.table([columns[name] for name in schema.names], schema=schema), references)


def _short(message: str | None) -> str | None:
    """One line; None stays None."""
    return None if message is None else (" ".join(message.split())[:_MAX_ERROR] or "unknown error")
