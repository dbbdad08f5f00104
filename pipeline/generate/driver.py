"""`sere generate`: Ray Data reads the input, Ray actors run vLLM replicas with re-routing, and the parts they write add up.

The order of things: what the job is (model, input, artifact), whose run directory it is, what in it is finished, the rest
through the replicas, and at the end the figures of all parts together.
"""

import dataclasses
import functools
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sere.conf.errors import ConfigError
from sere.conf.schema import GenerateConfig, RerouteConfig
from sere.pipeline.data.sources import PLACE, Source, describe_file, find_sources, read_file, unify
from sere.pipeline.evaluate.scorers import exact_match, score
from sere.pipeline.generate.identity import (
    SIMILARITY,
    Session,
    job_settings,
    read_manifest,
    read_sessions,
    read_similarity,
    settings_digest,
    write_manifest,
)
from sere.pipeline.generate.monitor import Monitor, check_errors
from sere.pipeline.generate.parts import KEY, Finished, RunFolder, to_parquet
from sere.pipeline.generate.preflight import ReplicaStarter, check_reroute, engine_kwargs, join_cluster, read_model_facts
from sere.pipeline.generate.replica.answers import Answer, answer_table
from sere.pipeline.runtime.storage import Storage
from sere.pipeline.tracking.store import resolve_artifact
from sere.pipeline.tracking.tracker import NullTracker, resume, track

_log = logging.getLogger(__name__)
# Small, so that the first rows of a large file arrive soon.
_BLOCK_BYTES = 16 * 2**20
_ORDERED_ROWS = 100_000
_STOP_S, _STOP_INTERRUPTED_S = 120.0, 15.0


@dataclass(frozen=True)
class Summary:
    """What a finished job has to show."""

    output: str
    metrics: dict[str, float]
    was_finished: bool
    """It was finished before; nothing was done now."""


def describe_input(config: GenerateConfig) -> Source:
    """Scan the input's files, each in a Ray task.

    Raises:
        ConfigError: if there is no input, or it cannot be used.
    """
    import ray

    listing = find_sources(config)
    describe = ray.remote(num_cpus=0.5)(describe_file)
    try:
        files = ray.get([describe.remote(listing, index) for index in range(len(listing.files))])
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, ConfigError) else error.as_instanceof_cause() from None
    return unify(listing, files)


def _read(batch: dict[str, Any], *, source: Any, rows_per_table: int) -> Iterator[pa.Table]:
    """A Ray Data function: from the number of a file to its rows that are left."""
    import ray

    described, finished = ray.get(source[0])
    for index in batch["index"]:
        name = described.files[int(index)].name
        yield from read_file(described, int(index), rows_per_table=rows_per_table, skip=finished.get(name))


def read_batches(source: Source, finished: Finished, config: GenerateConfig) -> Iterator[pa.Table]:
    """The rows that are not finished, `batch_size` at a time, in the input's order or by `order_by`."""
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    # Our own progress shows rows and tokens; Ray Data's shows operators.
    context.enable_progress_bars = False
    # It logs every failure with several tracebacks, before the exception that is handled here.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context.execution_options.preserve_order = True
    context.target_max_block_size = _BLOCK_BYTES
    left = [
        {"index": index} for index, file in enumerate(source.files) if file.num_rows > len(finished.rows.get(file.name, ()))
    ]
    if not left:
        return
    # In a list: as an argument of its own Ray Data would not let it through.
    reference = [ray.put((source, finished.rows))]
    read = functools.partial(_read, source=reference, rows_per_table=config.batch_size)
    rows = ray.data.from_items(left, override_num_blocks=len(left)).map_batches(read, batch_size=1, num_cpus=0.5)
    if config.order_by:
        rows = rows.sort(list(config.order_by))
    try:
        yield from rows.iter_batches(batch_size=config.batch_size, batch_format="pyarrow", prefetch_batches=2)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, ConfigError) else error.as_instanceof_cause() from None


def _work(
    config: GenerateConfig, source: Source, finished: Finished, monitor: Monitor, starter: ReplicaStarter, folder: RunFolder
) -> None:
    """Run what is left through replicas."""
    from sere.pipeline.generate.dispatcher import Dispatcher

    given_up = iter(range(10**6))

    def give_up(table: pa.Table, why: str) -> None:
        rows = [(0, row, Answer(error=why)) for row in range(len(table))]
        answers = answer_table(rows, {0: table}, source.schema, config.id_column)
        folder.write_part(f"s{monitor.session.number:04d}-driver-{next(given_up):06d}", answers)

    def keys_written(name: str) -> set[tuple[str, int]]:
        return {
            key
            for part in folder.parts(f"{name}-")
            for key in zip(*(column.to_pylist() for column in folder.read(part, KEY).select(KEY).columns), strict=True)
        }

    dispatcher = Dispatcher(
        starter.start,
        starter.end,
        num_replicas=config.engine.max_replicas or config.engine.num_replicas,
        concurrent_batches=config.concurrent_batches,
        max_retries=config.max_retries,
        keys_written=keys_written,
        give_up=give_up,
    )
    patience = _STOP_INTERRUPTED_S
    try:
        for _ in dispatcher.run(read_batches(source, finished, config)):
            monitor.update(dispatcher)
        monitor.update(dispatcher)
        patience = _STOP_S
    finally:
        # Also when interrupted: what replicas have finished is kept.
        dispatcher.close(timeout_s=patience)
        monitor.update(dispatcher, final=True)


def _prepare_reroute(config: GenerateConfig, facts: Any, scratch: Path) -> tuple[RerouteConfig | None, bytes]:
    reroute = config.reroute
    if reroute is None:
        return None, b""
    path = None
    if reroute.policy == "sere":
        path = resolve_artifact(reroute.similarity, tracking_uri=config.tracking.uri, folder=scratch)
        reroute = dataclasses.replace(reroute, similarity=str(path.absolute()))
    check_reroute(reroute, config.model, facts)
    return reroute, read_similarity(reroute, path)


def _check_stats_dir(reroute: RerouteConfig | None, storage: Storage) -> None:
    if reroute is None or reroute.stats_dir is None or storage.get_json("job.json") is not None:
        return
    if any(Path(reroute.stats_dir).glob("*")):
        # Its counters would be added to this run's.
        raise ConfigError(f"stats_dir {reroute.stats_dir} holds an earlier run's counters: name a new or empty folder")


def generate(config: GenerateConfig, *, parent_run_id: str | None = None) -> Summary:
    """Run the job, or go on with it.

    Args:
        config: The job.
        parent_run_id: MLflow run below which this one is recorded.

    Raises:
        ConfigError, SimilarityError: if the model, the data, the run directory or a setting cannot be used, or engines cannot
            start. What was finished stays; the same command goes on with it.
    """
    from sere.ops.model_digest import model_digest

    storage = Storage(config.output, config.storage_options)
    facts = read_model_facts(config)
    with tempfile.TemporaryDirectory(prefix="sere-") as scratch:
        reroute, artifact = _prepare_reroute(config, facts, Path(scratch))
        _check_stats_dir(reroute, storage)
        on_gpu = join_cluster(config)
        source = describe_input(config)
        model = model_digest(config.model)
        settings = job_settings(config, model_digest=model, fingerprints=source.fingerprints, artifact=artifact)
        with RunFolder(storage, settings, digest=settings_digest(settings), overwrite=config.overwrite) as folder:
            manifest = read_manifest(folder)
            if manifest is not None:
                return Summary(config.output, manifest["metrics"], was_finished=True)
            if artifact:
                storage.put(SIMILARITY, artifact)
            kwargs = engine_kwargs(config, reroute, on_gpu=on_gpu)
            metrics = _run(config, source, folder, kwargs, model=model, on_gpu=on_gpu, parent_run_id=parent_run_id)
    return Summary(config.output, metrics, was_finished=False)


def _run(
    config: GenerateConfig,
    source: Source,
    folder: RunFolder,
    kwargs: dict[str, Any],
    *,
    model: str,
    on_gpu: bool,
    parent_run_id: str | None,
) -> dict[str, float]:
    finished = folder.scan()
    earlier = read_sessions(folder)
    noted = folder.storage.get_json("run.json") or {}
    name = "unmodified" if config.reroute is None else config.reroute.policy
    run_id = resume(config.tracking, noted.get("mlflow_run_id"))
    how = {"kind": "generate", "default_name": name, "run_id": run_id, "parent_run_id": parent_run_id}
    with track(config.tracking, **how, system_metrics=True) as tracker:
        folder.storage.put_json("run.json", {"mlflow_run_id": tracker.run_id})
        if run_id is None:
            tracker.log_config(config)
            tracker.log_params({"model_digest": model})
            tracker.log_dataset(
                source=config.data,
                digest=settings_digest(source.fingerprints),
                num_rows=source.num_rows,
                context="generation",
            )
        monitor = Monitor(
            config=config, num_rows=source.num_rows, before=finished, earlier=earlier, folder=folder, tracker=tracker
        )
        if finished.num_rows < source.num_rows:
            starter = ReplicaStarter(config, kwargs, folder, source.schema, session=monitor.session.number, on_gpu=on_gpu)
            with monitor:
                _work(config, source, finished, monitor, starter, folder)
        return _finish(config, source, folder, tracker)


def _finish(config: GenerateConfig, source: Source, folder: RunFolder, tracker: NullTracker) -> dict[str, float]:
    """Check that every row is there once, put them in order if asked, and work out the figures."""
    finished = folder.scan()
    if finished.num_rows != source.num_rows:
        raise ConfigError(
            f"{source.num_rows - finished.num_rows} of {source.num_rows} rows are not finished: run the same command again"
        )
    if finished.num_duplicates:
        _log.warning("%d rows had been answered twice; one answer of each is kept", finished.num_duplicates)
    if config.preserve_order:
        _put_in_order(source, folder)
    scores, errors, sums = [], [], {"prompt_tokens": 0}
    for table in folder.read_all(folder.parts()):
        scores.append(score(table, reference_column=config.reference_column, task_column=config.task_column))
        errors.append(table.filter(pc.is_valid(table["error"])))
        sums["prompt_tokens"] += pc.sum(table["num_prompt_tokens"]).as_py() or 0
    failed = pa.concat_tables(errors)
    folder.storage.put("errors.parquet", to_parquet(failed))
    first, where = failed["error"][:3].to_pylist(), folder.storage.shown
    # Also where the driver that saw it is gone.
    check_errors(config, num_rows=finished.num_rows, num_errors=finished.num_errors, first=first, where=where)
    sessions = read_sessions(folder)
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
    folder.storage.put_json("summary.json", metrics)
    tracker.log_values(metrics, "summary.json")
    write_manifest(folder, {"metrics": metrics})
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


def _put_in_order(source: Source, folder: RunFolder) -> None:
    """Write the parts anew in the input's order. Killed in between, both are there, and the next scan sorts that out."""
    import ray.data

    before = folder.parts()
    places = {file.name: number for number, file in enumerate(source.files)}
    read = functools.partial(_read_part, folder=folder.for_replicas(), places=places)
    names = ray.data.from_items([{"name": name} for name in before], override_num_blocks=len(before))
    rows = names.map_batches(read, batch_size=1, num_cpus=0.5).sort([PLACE, "source_row"])
    token = f"{time.time_ns():x}"
    tables = rows.iter_batches(batch_size=_ORDERED_ROWS, batch_format="pyarrow")
    for number, table in enumerate(tables):
        folder.write_part(f"ordered-{token}-{number:06d}", table.drop_columns([PLACE]))
    for name in before:
        folder.storage.remove(name)


def _read_part(batch: dict[str, Any], *, folder: RunFolder, places: dict[str, int]) -> Iterator[pa.Table]:
    for name in batch["name"]:
        table = folder.read(str(name))
        numbers = [places[file] for file in table["source_file"].to_pylist()]
        yield table.append_column(PLACE, pa.array(numbers, pa.int64()))
