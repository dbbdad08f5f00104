"""`sere generate`: Ray Data reads a dataset and ray.data.llm runs it through vLLM replicas with re-routing configured."""

import dataclasses
import functools
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration_jobs.inputs import find_files
from calibration_jobs.tracking import NullTracker, resolve_artifact, track
from conf.schema import ConfigError, GenerateConfig, RerouteConfig
from pipeline.datasets import ResultFolder, check_dataset, read_dataset
from pipeline.engines import ModelFacts, check_reroute, engine_kwargs, find_gpus, read_model_facts
from pipeline.evaluate import ExactMatch, Throughput
from pipeline.rows import TIMING_SCHEMA, make_postprocess, make_preprocess, pack, unpack

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

_PROGRESS_INTERVAL_S = 5.0


def build_pipeline(
    dataset: "ray.data.Dataset",
    config: GenerateConfig,
    facts: ModelFacts,
    reroute: RerouteConfig | None,
    *,
    on_gpu: bool,
) -> "ray.data.Dataset":
    """Input rows to result rows, lazily: the input's columns, then `RESULT_SCHEMA` and `TIMING_SCHEMA`."""
    import pyarrow as pa
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    schema = dataset.schema()
    input_schema = pa.schema(list(zip(schema.names, schema.types, strict=True)))
    placement = {} if on_gpu else {"placement_group_config": {"bundle_per_worker": {"CPU": config.engine.cpus_per_replica}}}
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=config.model,
            engine_kwargs=engine_kwargs(config, reroute, on_gpu=on_gpu),
            concurrency=(config.engine.replicas, config.engine.replicas),
            batch_size=config.batch_size,
            max_concurrent_batches=config.concurrent_batches,
            accelerator_type=config.engine.accelerator_type,
            should_continue_on_error=True,
            log_engine_metrics=False,
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
            **placement,
        ),
        preprocess=make_preprocess(config.sampling),
        # Unlike its neighbours' resources, so that Ray Data does not fuse it with them and merge the batches again.
        preprocess_map_kwargs={"num_cpus": 0.5},
        postprocess=make_postprocess(
            max_tokens=config.sampling.max_tokens, max_model_len=facts.context_length, stop_ids=facts.stop_ids
        ),
    )
    # One block a batch: otherwise a replica that gets a file's only block gets the whole file.
    packed = dataset.map_batches(
        functools.partial(pack, prompt_column=config.prompt_column), batch_format="pyarrow"
    ).repartition(target_num_rows_per_block=config.batch_size)
    return processor(packed).map_batches(functools.partial(unpack, input_schema=input_schema), batch_format="pyarrow")


def _refusal(stats_dir: str) -> ConfigError | None:
    """What an engine worker wrote when it refused to start."""
    for file in sorted(Path(stats_dir).glob("*.refused")):
        return ConfigError(file.read_text())
    return None


@contextmanager
def _progress(num_rows: int) -> Iterator[Any]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("Starting engines", total=num_rows, speed="")

        def advance(throughput: Throughput) -> None:
            speed = throughput.finalize().get("tokens_per_s")
            progress.update(
                task,
                description="Generating",
                completed=throughput.num_rows,
                speed=f"{speed:.0f} tokens/s" if speed else "",
            )

        yield advance


def _consume(
    results: "ray.data.Dataset", config: GenerateConfig, tracker: NullTracker, folder: ResultFolder, num_rows: int
) -> dict[str, float]:
    """Run the pipeline: write, evaluate and report batch by batch."""
    throughput = Throughput()
    exact_match = ExactMatch(reference_column=config.reference_column, task_column=config.task_column)
    started, reported = time.monotonic(), 0.0
    with _progress(num_rows) as advance:
        batches: Iterator[pa.Table] = results.iter_batches(batch_format="pyarrow", batch_size=None)
        for table in batches:
            if not table.num_rows:
                continue
            folder.write(table.drop_columns(TIMING_SCHEMA.names))
            throughput.update(table)
            exact_match.update(table)
            advance(throughput)
            now = time.monotonic()
            if now - reported > _PROGRESS_INTERVAL_S:
                reported = now
                tracker.log_metrics({"progress/rows": throughput.num_rows}, step=int(now - started))
    if throughput.num_rows != num_rows:
        raise RuntimeError(f"{num_rows} rows went in, {throughput.num_rows} came out: nothing was written")
    folder.finish()
    return {**throughput.finalize(), **exact_match.finalize(), "elapsed_s": time.monotonic() - started}


def _record_counters(tracker: NullTracker, stats_dir: str) -> dict[str, float]:
    from ops.stats import read_counters, summarize

    layers = read_counters(stats_dir)
    for layer in layers:
        values = {f"layer/{name}": layer.per_step(name) for name in ("active_experts_before", "active_experts_after")}
        values |= {f"layer/{name}": layer.counts[name] for name in ("rerouted_slots", "critical_slots")}
        tracker.log_metrics(values, step=layer.layer)
    return summarize(layers)


def generate(config: GenerateConfig) -> dict[str, float]:
    """Run the job.

    Returns:
        The metrics that were recorded: rows, tokens, `tokens_per_s`, `exact_match`, and the counters' summary.

    Raises:
        ConfigError, SimilarityError: if the model, the data or a setting cannot be used; nothing is written.
        RuntimeError: if the engines failed.
    """
    import ray

    from ops.digest import files_digest, model_digest

    folder = ResultFolder(config.output)
    _, files = find_files(config.data)
    facts = read_model_facts(config)
    with tempfile.TemporaryDirectory(prefix="sere-") as scratch:
        reroute = config.reroute
        if reroute is not None:
            stats_dir = reroute.stats_dir or str(Path(scratch) / "stats")
            if any(Path(stats_dir).glob("*")):
                # Its counters would be added to this run's.
                raise ConfigError(f"stats_dir {stats_dir} holds an earlier run's counters: name a new or empty folder")
            changes: dict[str, Any] = {"stats_dir": stats_dir}
            if reroute.policy == "sere":
                local = resolve_artifact(reroute.similarity, tracking_uri=config.tracking.uri, folder=Path(scratch))
                changes["similarity"] = str(local.absolute())
            reroute = dataclasses.replace(reroute, **changes)
            check_reroute(reroute, config.model, facts)
        on_gpu = find_gpus(config)
        context = ray.data.DataContext.get_current()
        # Our own progress shows rows and tokens; Ray Data's shows operators.
        context.enable_progress_bars = False
        # It also logs every failure with several tracebacks, before the exception that is handled here.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        context.execution_options.preserve_order = True
        dataset = read_dataset(config)
        num_rows = check_dataset(dataset, config)
        name = "unmodified" if reroute is None else reroute.policy
        with track(config.tracking, kind="generate", default_name=name) as tracker:
            tracker.log_config(config)
            tracker.log_params({"model_digest": model_digest(config.model)})
            tracker.log_dataset(source=config.data, digest=files_digest(files), num_rows=num_rows, context="generation")
            results = build_pipeline(dataset, config, facts, reroute, on_gpu=on_gpu)
            try:
                metrics = _consume(results, config, tracker, folder, num_rows)
            except BaseException as error:
                # Also when interrupted: nothing half-written stays.
                folder.discard()
                refusal = _refusal(reroute.stats_dir) if reroute is not None else None
                if refusal is not None:
                    raise refusal from error
                raise
            if reroute is not None:
                metrics |= _record_counters(tracker, reroute.stats_dir)
            tracker.log_metrics(metrics)
    return metrics
