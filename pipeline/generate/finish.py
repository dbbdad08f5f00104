"""The end of a generate job: nothing missing, nothing twice, in order if asked; figures of all parts together."""

import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from sere.conf.errors import TryAgainError
from sere.conf.schema import GenerateConfig
from sere.pipeline.data.source import Source
from sere.pipeline.evaluate.scorers import EXACT_MATCH, SCORES_FILE, Scores, with_scores
from sere.pipeline.generate.arrange import arrange, failed_rows
from sere.pipeline.generate.attempts import forget_attempts
from sere.pipeline.generate.columns import references_of
from sere.pipeline.generate.identity import ERRORS
from sere.pipeline.generate.monitor import check_errors
from sere.pipeline.generate.parts import KEY, Parts, to_parquet
from sere.pipeline.generate.record import Session, read_sessions, write_manifest
from sere.pipeline.generate.replica.answers import result_schema
from sere.pipeline.runtime.job_folder import JobFolder
from sere.pipeline.tracking.tracker import NullTracker

_log = logging.getLogger(__name__)


def finish_settings(config: GenerateConfig) -> dict[str, Any]:
    """What of the settings only this end of the job depends on: it can be done again without an engine."""
    return {key: getattr(config, key) for key in ("reference_column", "task_column", "preserve_order")}


def finish(
    config: GenerateConfig,
    source: Source,
    folder: JobFolder,
    parts: Parts,
    tracker: NullTracker,
    *,
    is_ordered: bool = False,
) -> dict[str, float]:
    """Check that every row is there once, put them in order if asked, work out the figures, and declare the job finished.

    What is superseded goes at the very end, by list. Interrupted at any point, the next call does all of this again.

    Args:
        config: Of the job.
        source: Its input.
        folder: Its folder.
        parts: Its results.
        tracker: Gets the figures.
        is_ordered: The parts are in the input's order.

    Raises:
        TryAgainError: if rows are not finished.
        ConfigError: if more of them have errors than the job allows.
    """
    finished = parts.scan()
    if finished.num_rows != source.num_rows:
        raise TryAgainError(
            f"{source.num_rows - finished.num_rows} of {source.num_rows} rows are not finished: run the same command again"
        )
    if finished.num_duplicates:
        _log.warning("%d rows had been answered twice; one answer of each is kept", finished.num_duplicates)
    assert source.schema is not None
    references = references_of(config, source.schema)
    arranged = arrange(config, source, folder, parts, finished, references=references, is_ordered=is_ordered)
    empty = with_scores(result_schema(source.schema, config.id_column).empty_table(), references)
    first = _write_errors(parts, failed_rows(parts, arranged, folder), empty)
    # Also where the driver that saw it is gone.
    check_errors(config, num_rows=finished.num_rows, num_errors=finished.num_errors, first=first, where=parts.storage.shown)
    sessions = read_sessions(parts.storage)
    metrics = {
        "num_rows": finished.num_rows,
        "num_errors": finished.num_errors,
        "prompt_tokens": finished.prompt_tokens,
        "generated_tokens": finished.generated_tokens,
        "mean_generated_tokens": finished.generated_tokens / max(1, finished.num_rows - finished.num_errors),
        **_speed(sessions),
        **(_exact_match(config, folder, parts, list(arranged), tracker) if references else {}),
        **_counters(sessions, tracker),
    }
    tracker.log_metrics(metrics)
    parts.storage.put_json("summary.json", metrics)
    tracker.log_values(metrics, "summary.json")
    folder.check(now=True)
    write_manifest(parts, {"metrics": metrics, "finish": finish_settings(config)}, arranged)
    parts.storage.remove_all(sorted(set(finished.parts) - set(arranged)))
    forget_attempts(parts.storage)
    return metrics


def _write_errors(parts: Parts, failed: Iterable[pa.Table], empty: pa.Table) -> list[str]:
    """Write the rows that have errors to a file of their own, be there any or not; returns the first errors."""
    first: list[str] = []

    def tables() -> Iterator[pa.Table]:
        schema = None
        for table in failed:
            first.extend(table["error"].slice(0, 3 - len(first)).to_pylist())
            schema = schema or table.schema
            yield table.cast(schema)
        if schema is None:
            yield empty

    parts.storage.put(ERRORS, to_parquet(tables()))
    return first


def _exact_match(
    config: GenerateConfig, folder: JobFolder, parts: Parts, names: list[str], tracker: NullTracker
) -> dict[str, float]:
    """Record every row's score, and return their averages; only small columns of the results are read."""
    with tempfile.TemporaryDirectory(prefix="sere-") as scratch:
        file = Path(scratch) / SCORES_FILE
        scores = Scores(file, config.task_column)
        for table in parts.read_all(names, [*KEY, EXACT_MATCH, config.task_column]):
            folder.check()
            scores.add(table)
        found = scores.close()
        tracker.log_file(file)
    return found


def _speed(sessions: list[Session]) -> dict[str, float]:
    """Over all sessions; a row that was done again counts as often as it was done."""
    seconds = sum(session.generation_s for session in sessions)
    tokens = sum(session.generated_tokens for session in sessions)
    asked, found = (sum(getattr(session, f"prefix_cache_{what}") for session in sessions) for what in ("queries", "hits"))
    return {
        "elapsed_s": sum(session.elapsed_s for session in sessions),
        "startup_s": sum(session.startup_s for session in sessions),
        "generation_s": seconds,
        "working_s": sum(session.working_s for session in sessions),
        "num_sessions": len(sessions),
        "num_replaced_replicas": sum(session.num_replaced for session in sessions),
        **({"tokens_per_s": tokens / seconds} if seconds > 0 else {}),
        **({"prefix_cache_hit_rate": found / asked} if asked else {}),
    }


def _counters(sessions: list[Session], tracker: NullTracker) -> dict[str, float]:
    """Record what re-routing did per layer, and return it over all layers."""
    from sere.ops.engine.counters import LayerCounts, summarize

    numbers = sorted({int(layer) for session in sessions for layer in session.counters})
    layers = []
    for number in numbers:
        counts: dict[str, int] = {}
        for session in sessions:
            for name, count in session.counters.get(str(number), {}).items():
                counts[name] = counts.get(name, 0) + count
        layers.append(LayerCounts(number, counts))
    for layer in layers:
        values = {f"layer/{name}": layer.per_step(name) for name in ("active_experts_before", "active_experts_after")}
        values |= {f"layer/{name}": layer.counts[name] for name in ("rerouted_slots", "critical_slots")}
        tracker.log_metrics(values, step=layer.layer)
    return summarize(layers)
