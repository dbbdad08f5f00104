"""Observers of result rows: answers against references, and how much was generated how fast."""

from collections import defaultdict

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.rows import TIMING_SCHEMA


class ExactMatch:
    """Share of rows whose generated text equals the reference, white space at the ends aside; overall and per task.

    A row with an error counts as wrong.
    """

    def __init__(self, *, reference_column: str, task_column: str) -> None:
        self._reference, self._task = reference_column, task_column
        self._hits: dict[str, int] = defaultdict(int)
        self._rows: dict[str, int] = defaultdict(int)

    def update(self, table: pa.Table) -> None:
        """Add result rows; does nothing where the data has no references."""
        if self._reference not in table.column_names:
            return
        references = table[self._reference].cast(pa.string())
        known = table.filter(pc.is_valid(references))
        generated = pc.utf8_trim_whitespace(pc.fill_null(known["generated_text"], ""))
        hits = pc.equal(generated, pc.utf8_trim_whitespace(known[self._reference].cast(pa.string())))
        hits = pc.and_(hits, pc.is_null(known["error"]))
        tasks = known[self._task].cast(pa.string()).to_pylist() if self._task in known.column_names else [None] * len(known)
        for task, hit in zip(tasks, hits.to_pylist(), strict=True):
            for key in ("", task) if task else ("",):
                self._rows[key] += 1
                self._hits[key] += bool(hit)

    def finalize(self) -> dict[str, float]:
        """`exact_match`, and `exact_match/TASK` per task; empty without references."""
        return {
            f"exact_match/{task}" if task else "exact_match": self._hits[task] / rows
            for task, rows in sorted(self._rows.items())
        }


class Throughput:
    """Rows, errors, tokens, and tokens per second between the first arrival at an engine and the last token."""

    def __init__(self) -> None:
        self.num_rows = self.num_errors = self.prompt_tokens = self.generated_tokens = 0
        self._started: float | None = None
        self._finished: float | None = None

    def update(self, table: pa.Table) -> None:
        """Add result rows, with their timing columns."""
        self.num_rows += table.num_rows
        self.num_errors += table.num_rows - table["error"].null_count
        self.prompt_tokens += pc.sum(table["num_prompt_tokens"]).as_py() or 0
        self.generated_tokens += pc.sum(table["num_generated_tokens"]).as_py() or 0
        started, finished = (table[name].drop_null() for name in TIMING_SCHEMA.names)
        finite = pc.is_finite(finished)
        if pc.any(finite).as_py():
            first, last = pc.min(started.filter(finite)).as_py(), pc.max(finished.filter(finite)).as_py()
            self._started = first if self._started is None else min(self._started, first)
            self._finished = last if self._finished is None else max(self._finished, last)

    def finalize(self) -> dict[str, float]:
        """Sums, the mean output length, and `tokens_per_s` where the engines reported times. Units are in the names."""
        good = max(1, self.num_rows - self.num_errors)
        metrics = {
            "num_rows": self.num_rows,
            "num_errors": self.num_errors,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "mean_generated_tokens": self.generated_tokens / good,
        }
        if self._started is not None and self._finished is not None and self._finished > self._started:
            metrics["generation_s"] = self._finished - self._started
            metrics["tokens_per_s"] = self.generated_tokens / metrics["generation_s"]
        return metrics
