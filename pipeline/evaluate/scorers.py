"""Answers against references: a score per row, and their averages."""

import json

import pyarrow as pa
import pyarrow.compute as pc

from sere.pipeline.generate.parts import KEY

SCORE_SCHEMA = pa.schema([("source_file", pa.string()), ("source_row", pa.int64()), ("task", pa.string()), ("hit", pa.bool_())])


def score(table: pa.Table, *, reference_column: str, task_column: str) -> pa.Table:
    """Whether each row's generated text equals its reference, white space at the ends aside.

    Returns:
        `SCORE_SCHEMA`, a row per result row. `hit` is null without a reference; a row with an error is a miss.
    """
    hit = pa.nulls(len(table), pa.bool_())
    if reference_column in table.column_names:
        references = _text(table[reference_column])
        generated = pc.utf8_trim_whitespace(pc.fill_null(table["generated_text"], ""))
        hit = pc.and_kleene(pc.equal(generated, pc.utf8_trim_whitespace(references)), pc.is_null(table["error"]))
        hit = pc.if_else(pc.is_valid(references), hit, None)
    has_tasks = task_column in table.column_names
    task = _text(table[task_column]) if has_tasks else pa.nulls(len(table), pa.string())
    return pa.table([*(table[name] for name in KEY), task, hit], schema=SCORE_SCHEMA)


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """A column as text; lists and the like as JSON."""
    try:
        return column.cast(pa.string())
    except pa.ArrowException:
        return pa.array(
            [None if v is None else json.dumps(v, ensure_ascii=False, default=str) for v in column.to_pylist()], pa.string()
        )


def exact_match(scores: pa.Table) -> dict[str, float]:
    """`exact_match`, and `exact_match/TASK` per task; empty without references."""
    known = scores.filter(pc.is_valid(scores["hit"]))
    if not len(known):
        return {}
    known = known.set_column(known.column_names.index("hit"), "hit", known["hit"].cast(pa.float64()))
    by_task = known.filter(pc.is_valid(known["task"])).group_by("task").aggregate([("hit", "mean")])
    shares = zip(by_task["task"].to_pylist(), by_task["hit_mean"].to_pylist(), strict=True)
    return {"exact_match": pc.mean(known["hit"]).as_py()} | {f"exact_match/{task}": share for task, share in sorted(shares)}
