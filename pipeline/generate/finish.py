"""The end of a generate job: nothing missing, nothing twice, in order if asked; figures of all parts together."""

import functools
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sere.conf.errors import TryAgainError
from sere.conf.schema import GenerateConfig
from sere.pipeline.data.source import FILE_NUMBER, Source
from sere.pipeline.evaluate.scorers import exact_match, score
from sere.pipeline.generate.attempts import forget_attempts
from sere.pipeline.generate.monitor import check_errors
from sere.pipeline.generate.parts import Parts, to_parquet
from sere.pipeline.generate.record import Session, read_sessions, write_manifest
from sere.pipeline.runtime.job_folder import JobFolder
from sere.pipeline.tracking.tracker import NullTracker

_log = logging.getLogger(__name__)
_ORDERED_ROWS = 100_000


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
    before = names = parts.names()
    if config.preserve_order and not is_ordered:
        names = _put_in_order(source, folder, parts, before, num_rows=finished.num_rows)
    scores, errors, sums = [], [], {"prompt_tokens": 0}
    for table in parts.read_all(names):
        folder.check()
        scores.append(score(table, reference_column=config.reference_column, task_column=config.task_column))
        errors.append(table.filter(pc.is_valid(table["error"])))
        sums["prompt_tokens"] += pc.sum(table["num_prompt_tokens"]).as_py() or 0
    failed = pa.concat_tables(errors)
    parts.storage.put("errors.parquet", to_parquet(failed))
    first, where = failed["error"][:3].to_pylist(), parts.storage.shown
    # Also where the driver that saw it is gone.
    check_errors(config, num_rows=finished.num_rows, num_errors=finished.num_errors, first=first, where=where)
    sessions = read_sessions(parts.storage)
    all_scores = pa.concat_tables(scores)
    metrics = {
        "num_rows": finished.num_rows,
        "num_errors": finished.num_errors,
        **sums,
        "generated_tokens": finished.generated_tokens,
        "mean_generated_tokens": finished.generated_tokens / max(1, finished.num_rows - finished.num_errors),
        **_speed(sessions),
        **exact_match(all_scores),
        **_counters(sessions, tracker),
    }
    tracker.log_metrics(metrics)
    with tempfile.TemporaryDirectory(prefix="sere-") as scratch:
        file = Path(scratch) / "scores.parquet"
        file.write_bytes(to_parquet(all_scores))
        tracker.log_file(file)
    parts.storage.put_json("summary.json", metrics)
    tracker.log_values(metrics, "summary.json")
    folder.check(now=True)
    write_manifest(parts, {"metrics": metrics, "finish": finish_settings(config)}, names)
    parts.storage.remove_all(sorted(set(before) - set(names)))
    forget_attempts(parts.storage)
    return metrics


def _speed(sessions: list[Session]) -> dict[str, float]:
    """Over all sessions; a row that was done again counts as often as it was done."""
    seconds = sum(session.generation_s for session in sessions)
    tokens = sum(session.generated_tokens for session in sessions)
    return {
        "elapsed_s": sum(session.elapsed_s for session in sessions),
        "startup_s": sum(session.startup_s for session in sessions),
        "generation_s": seconds,
        "working_s": sum(session.working_s for session in sessions),
        "num_sessions": len(sessions),
        "num_replaced_replicas": sum(session.num_replaced for session in sessions),
        **({"tokens_per_s": tokens / seconds} if seconds > 0 else {}),
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


def _put_in_order(source: Source, folder: JobFolder, parts: Parts, before: list[str], *, num_rows: int) -> list[str]:
    """Write the parts once more in the input's order, beside the others; returns the new ones' names.

    Raises:
        TryAgainError: if it is not as many rows that were written.
    """
    import ray.data

    places = {file.name: number for number, file in enumerate(source.files)}
    read = functools.partial(_read_part, parts=parts, places=places)
    names = ray.data.from_items([{"name": name} for name in before], override_num_blocks=len(before))
    rows = names.map_batches(read, batch_size=1, num_cpus=0.5).sort([FILE_NUMBER, "source_row"])
    prefix, num_written = f"ordered-{folder.token}-", 0
    for number, table in enumerate(rows.iter_batches(batch_size=_ORDERED_ROWS, batch_format="pyarrow")):
        folder.check()
        parts.write(f"{prefix}{number:06d}", table.drop_columns([FILE_NUMBER]))
        num_written += len(table)
    written = parts.names(prefix)
    counted = sum(len(table) for table in parts.read_all(written, ["source_row"]))
    if not num_rows == num_written == counted:
        raise TryAgainError(
            f"{parts.storage.shown}: of {num_rows} rows to be put in order {num_written} were written and {counted} are there. "
            "Nothing was removed: run the same command again"
        )
    return written


def _read_part(batch: dict[str, Any], *, parts: Parts, places: dict[str, int]) -> Iterator[pa.Table]:
    for name in batch["name"]:
        table = parts.read(str(name))
        numbers = [places[file] for file in table["source_file"].to_pylist()]
        yield table.append_column(FILE_NUMBER, pa.array(numbers, pa.int64()))
