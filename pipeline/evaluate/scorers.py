"""Answers against references: a column of the results, and its averages."""

import json
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sere.pipeline.data.source import PLACE

EXACT_MATCH = "exact_match"
"""Column of the results, last, where the input has references: whether the row's answer is its reference."""
SCORED = b"sere.reference"
"""In the metadata of a table with that column: the column of references that it was made with."""
SCORES_FILE = "scores.parquet"
"""Artifact of a generate run: `source_file`, `source_row`, `task` and `hit` of each row."""
SCORE_SCHEMA = pa.schema([*PLACE, ("task", pa.string()), ("hit", pa.bool_())])


def with_scores(table: pa.Table, reference_column: str) -> pa.Table:
    """Results with the column `EXACT_MATCH`, made anew; without it where there are no references.

    An answer is right if it equals its reference, white space at the ends aside. Without a reference it is null; a row with
    an error is wrong.

    Args:
        table: Results.
        reference_column: The column of references; "": there is none.
    """
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != SCORED}
    if EXACT_MATCH in table.column_names and SCORED in (table.schema.metadata or {}):
        table = table.drop_columns([EXACT_MATCH])
    if not reference_column:
        return table.replace_schema_metadata(metadata)
    references = _text(table[reference_column])
    generated = pc.utf8_trim_whitespace(pc.fill_null(table["generated_text"], ""))
    hit = pc.and_kleene(pc.equal(generated, pc.utf8_trim_whitespace(references)), pc.is_null(table["error"]))
    hit = pc.if_else(pc.is_valid(references), hit, None)
    scored = table.append_column(pa.field(EXACT_MATCH, pa.bool_()), hit)
    return scored.replace_schema_metadata({**metadata, SCORED: reference_column.encode()})


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as text; lists and the like as JSON."""
    try:
        return column.cast(pa.string())
    except pa.ArrowException:
        texts = [None if v is None else json.dumps(v, ensure_ascii=False, default=str) for v in column.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.string())])


class Scores:
    """The scores of many tables: every row's in a file, and their averages. Memory does not grow with them."""

    def __init__(self, file: Path, task_column: str) -> None:
        """Begin the file.

        Args:
            file: Gets `SCORE_SCHEMA`, a row per result row; whole after `close`.
            task_column: The column that says what kind a row is; it need not be there.
        """
        self._writer = pq.ParquetWriter(file, SCORE_SCHEMA, compression="zstd")
        self._task_column = task_column
        self._by_task: defaultdict[str | None, list[int]] = defaultdict(lambda: [0, 0])

    def add(self, table: pa.Table) -> None:
        """Add results, of which `PLACE`, `EXACT_MATCH` and the task are needed."""
        tasks = pa.chunked_array([pa.nulls(len(table), pa.string())])
        if self._task_column in table.column_names:
            tasks = _text(table[self._task_column])
        scores = pa.table([*(table[name] for name in PLACE.names), tasks, table[EXACT_MATCH]], schema=SCORE_SCHEMA)
        self._writer.write_table(scores)
        known = scores.filter(pc.is_valid(scores["hit"]))
        counts = known.group_by("task").aggregate([("hit", "sum"), ("hit", "count")])
        for row in counts.to_pylist():
            count = self._by_task[row["task"]]
            count[0] += row["hit_sum"]
            count[1] += row["hit_count"]

    def close(self) -> dict[str, float]:
        """End the file; returns `exact_match`, and `exact_match/TASK` per task, of all rows with references."""
        self._writer.close()
        hits, rows = (sum(column) for column in zip((0, 0), *self._by_task.values(), strict=True))
        if not rows:
            return {}
        shares = {task: count[0] / count[1] for task, count in self._by_task.items() if task is not None}
        return {"exact_match": hits / rows} | {f"exact_match/{task}": shares[task] for task in sorted(shares)}
