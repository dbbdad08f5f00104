"""`sere generate`: Ray Data reads a dataset and ray.data.llm runs it through vLLM replicas with re-routing configured."""

import dataclasses
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration_jobs.tracking import NullTracker, resolve_artifact, track
from conf.schema import ConfigError, GenerateConfig, RerouteConfig
from pipeline.datasets import ResultFolder, check_dataset, find_files, read_dataset
from pipeline.evaluate import ExactMatch, Throughput
from pipeline.rows import TIMING_SCHEMA, make_postprocess, make_preprocess, pack, unpack

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

_PROGRESS_INTERVAL_S = 5.0
# What model families call the number of experts a token is sent to.
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What is known of a model without loading it."""

    context_length: int
    top_k: int | None
    stop_ids: frozenset[int]


def read_model_facts(config: GenerateConfig) -> ModelFacts:
    """Read the model's configuration files.

    Raises:
        ConfigError: if there is no such model.
    """
    import transformers

    trust = config.engine.trust_remote_code
    try:
        model_config = transformers.AutoConfig.from_pretrained(config.model, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {config.model} cannot be read ({str(error).splitlines()[0]}): give a model folder or a hub name"
        ) from error
    text_config = model_config.get_text_config()
    stop_ids = [getattr(text_config, "eos_token_id", None)]
    try:
        generation = transformers.GenerationConfig.from_pretrained(config.model)
        stop_ids.append(generation.eos_token_id)
    except OSError:
        pass
    flat = [i for ids in stop_ids for i in (ids if isinstance(ids, list) else [ids]) if i is not None]
    limit = getattr(text_config, "max_position_embeddings", None) or 2**31
    top_k = next((getattr(text_config, name) for name in _TOP_K_NAMES if getattr(text_config, name, None)), None)
    return ModelFacts(config.engine.max_model_len or limit, top_k, frozenset(flat))


def check_reroute(config: RerouteConfig, model: str, facts: ModelFacts) -> None:
    """Refuse settings that every engine would refuse at its start.

    Raises:
        ConfigError, SimilarityError: as the engine would.
    """
    if config.policy != "none" and facts.top_k is not None and config.primary_top_k > facts.top_k:
        raise ConfigError(f"primary_top_k must be between 1 and the model's top_k ({facts.top_k}), got {config.primary_top_k}")
    if config.policy == "sere":
        from ops.digest import model_digest
        from ops.similarity import SimilarityArtifact

        artifact = SimilarityArtifact.load(config.similarity)
        digest = model_digest(model) if config.check_model else None
        artifact.check_model(num_experts=artifact.num_experts, digest=digest)
        artifact.matrix(artifact.layers[0], config.metric)


def engine_kwargs(config: GenerateConfig, reroute: RerouteConfig | None, *, on_gpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's engine."""
    engine = config.engine
    arguments: dict[str, Any] = {
        "dtype": engine.dtype,
        "max_num_seqs": engine.max_num_seqs,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "enforce_eager": engine.enforce_eager,
        "trust_remote_code": engine.trust_remote_code,
    }
    if engine.max_model_len is not None:
        arguments["max_model_len"] = engine.max_model_len
    if not on_gpu:
        arguments["kv_cache_memory_bytes"] = int(engine.kv_cache_gib * 2**30)
    arguments |= engine.engine_kwargs
    if reroute is not None:
        arguments["additional_config"] = {**arguments.get("additional_config", {}), "sere": reroute.to_dict()}
    return arguments


def start_ray(config: GenerateConfig) -> bool:
    """Join or start a Ray cluster; returns whether it has GPUs.

    Raises:
        ConfigError: if the replicas do not fit.
    """
    import ray

    cpus = config.engine.replicas * config.engine.tensor_parallel_size * config.engine.cpus_per_replica
    if not ray.is_initialized():
        # Reading and writing need a core beside the replicas'; on one machine Ray may count more cores than there are.
        local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": max(os.cpu_count() or 1, int(cpus) + 1)}
        ray.init(include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False, **local)
    resources = ray.cluster_resources()
    gpus_wanted = config.engine.replicas * config.engine.tensor_parallel_size
    if resources.get("GPU", 0):
        if resources["GPU"] < gpus_wanted:
            raise ConfigError(
                f"{config.engine.replicas} replicas of {config.engine.tensor_parallel_size} GPUs need {gpus_wanted} GPUs, the "
                f"cluster has {resources['GPU']:.0f}: lower engine.replicas"
            )
        return True
    if resources.get("CPU", 0) < cpus + 1:
        raise ConfigError(
            f"{config.engine.replicas} replicas need {cpus:g} cores and one to read and write, the cluster has "
            f"{resources.get('CPU', 0):.0f}: lower engine.replicas or engine.cpus_per_replica"
        )
    return False


def build_pipeline(
    dataset: "ray.data.Dataset",
    config: GenerateConfig,
    facts: ModelFacts,
    reroute: RerouteConfig | None,
    *,
    on_gpu: bool,
) -> "ray.data.Dataset":
    """Input rows to result rows, lazily: the input's columns, then `RESULT_SCHEMA` and `TIMING_SCHEMA`."""
    import functools

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
            # Enough batches at once to keep the engine full while a batch waits for its slowest row.
            max_concurrent_batches=max(8, -(-2 * config.engine.max_num_seqs // config.batch_size)),
            accelerator_type=config.engine.accelerator_type,
            should_continue_on_error=True,
            log_engine_metrics=False,
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
            **placement,
        ),
        preprocess=make_preprocess(config.sampling),
        postprocess=make_postprocess(
            max_tokens=config.sampling.max_tokens, max_model_len=facts.context_length, stop_ids=facts.stop_ids
        ),
    )
    packed = dataset.map_batches(
        functools.partial(pack, prompt_column=config.prompt_column),
        batch_format="pyarrow",
        batch_size=config.batch_size,
    )
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
            changes: dict[str, Any] = {"stats_dir": stats_dir}
            if reroute.policy == "sere":
                local = resolve_artifact(reroute.similarity, tracking_uri=config.tracking.uri, folder=Path(scratch))
                changes["similarity"] = str(local.absolute())
            reroute = dataclasses.replace(reroute, **changes)
            check_reroute(reroute, config.model, facts)
        on_gpu = start_ray(config)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
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
            except Exception as error:
                folder.discard()
                refusal = _refusal(reroute.stats_dir) if reroute is not None else None
                if refusal is not None:
                    raise refusal from error
                raise
            if reroute is not None:
                metrics |= _record_counters(tracker, reroute.stats_dir)
            tracker.log_metrics(metrics)
    return metrics
