"""What a generate job is: the settings that determine its results, the artifact it uses, and what it writes."""

import dataclasses
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from sere.conf.errors import ConfigError
from sere.conf.masking import mask_values
from sere.conf.nested import flatten
from sere.conf.schema import GenerateConfig
from sere.pipeline.data.source import Source
from sere.pipeline.generate.attempts import ATTEMPT_NAMES, ATTEMPTS
from sere.pipeline.generate.parts import PART_NAMES, RESULTS
from sere.pipeline.runtime.job_folder import JobKind
from sere.pipeline.runtime.model_facts import CHOOSE_COMMIT, ModelFacts
from sere.pipeline.runtime.older_jobs import schema_defaults

SIMILARITY = "similarity.safetensors"
"""The artifact, in the run directory: every node finds it there."""
MANIFEST = "manifest.json"
INPUT = "described.json"
"""What is known of the input's files: those that are unchanged are not read again to describe them."""
ERRORS = "errors.parquet"
"""A copy of the results that have an error; without rows if none has."""
SESSIONS = "sessions"
LOGS = "logs"
# What the names of settings begin with that say which input it is; a file's name follows.
_DATA = "data/"
SESSION_NAMES = r"\d+\.json"
GENERATE = JobKind(
    name="generate",
    finished=MANIFEST,
    files=(INPUT, "run.json", ERRORS, "summary.json", SIMILARITY),
    results=RESULTS,
    folders={RESULTS: PART_NAMES, SESSIONS: SESSION_NAMES, ATTEMPTS: ATTEMPT_NAMES, LOGS: r"s\d+(-[0-9a-f]+)?-r\d+\.log"},
    settings_of_0_1=frozenset({"model_digest", "batch_size", "sampling.max_tokens"}),
    absent=schema_defaults(GenerateConfig),
    remedies={"model_digest": CHOOSE_COMMIT},
)
# What may change between a run and its continuation, as it does not change what a row's answer is made with.
_FREE = (
    "output",
    "overwrite",
    # The commits that they were, in `model_digest` and the fingerprint of the data, are what the job is of.
    "model_revision",
    "data_revision",
    "storage_options",
    "tracking",
    "preserve_order",
    "part_mib",
    "checkpoint_rows",
    "checkpoint_interval_s",
    "max_retries",
    "max_error_ratio",
    "retry_errors",
    "allow_mixed_batch",
    "stall_timeout_s",
    "reference_column",
    "task_column",
)
# What may change, too, but changes answers a little: recorded per session, and said where sessions differ.
_CONDITIONS = (
    "engine.max_model_len",
    *(
        f"engine.engine_kwargs.{name}"
        for name in (
            "gpu_memory_utilization",
            "kv_cache_memory_bytes",
            "num_gpu_blocks_override",
            "cpu_offload_gb",
            "swap_space",
            "max_num_batched_tokens",
        )
    ),
)
# Without re-routing a row's answer does not depend on them.
BATCHING = ("engine.max_num_seqs", "batch_size", "concurrent_batches", "order_by", "group_by_prefix")
"""Keys of the settings that say what rows meet in a step."""
_FREE_OF_ENGINE = (
    "num_replicas",
    "max_replicas",
    "gpus_per_replica",
    "cpus_per_replica",
    "accelerator_type",
    "kv_cache_gib",
    "executor",
)


def kind_of(source: Source) -> JobKind:
    """The kind of a job with this input: of a hub dataset, with what helps where its branch has moved."""
    if source.commit is None:
        return GENERATE
    remedy = "go on with a hub dataset's commit by data_revision=COMMIT"
    remedies = {f"{_DATA}{file.name}": remedy for file in source.files}
    return dataclasses.replace(GENERATE, remedies={**GENERATE.remedies, **remedies})


def earlier_settings(facts: ModelFacts, source: Source) -> dict[str, tuple[str | None, ...]]:
    """By setting, what a job that was begun by an earlier version may have in the place of today's value."""
    fingerprints = {f"{_DATA}{name}": (fingerprint,) for name, fingerprint in source.earlier_fingerprints.items()}
    return {"model_digest": facts.earlier_digests, **fingerprints}


def job_settings(config: GenerateConfig, *, model_digest: str, fingerprints: dict[str, Any], artifact: bytes) -> dict[str, Any]:
    """All that a row's answer depends on, as flat JSON values: of two jobs with equal settings one can go on with the other."""
    reroute = config.reroute.resolved() if config.reroute is not None else None
    values = dataclasses.asdict(dataclasses.replace(config, reroute=reroute))
    for key in _FREE:
        del values[key]
    for key in _FREE_OF_ENGINE:
        del values["engine"][key]
    if values["reroute"] is not None:
        # The digest says which artifact it is, wherever it lies.
        for key in ("similarity", "stats_dir"):
            del values["reroute"][key]
    settings = flatten(mask_values(values)) | {"model_digest": model_digest}
    if artifact:
        settings["similarity_digest"] = hashlib.sha256(artifact).hexdigest()
    settings |= {f"{_DATA}{name}": value for name, value in fingerprints.items()}
    return json.loads(json.dumps(settings))


def free_settings(config: GenerateConfig) -> frozenset[str]:
    """Keys of `job_settings` in which a job may differ from what it was begun with."""
    # Jobs that were begun before there were commits of data have it among their settings.
    always = (*_CONDITIONS, "data_revision")
    mixes = config.allow_mixed_batch or config.reroute is None or config.reroute.policy == "none"
    return frozenset((*always, *(BATCHING if mixes else ())))


def conditions(config: GenerateConfig) -> dict[str, Any]:
    """What a session's answers were made under and may differ from another session's, as flat JSON values."""
    values = {key: value for key, value in flatten(dataclasses.asdict(config)).items() if key in (*_CONDITIONS, *BATCHING)}
    versions = {f"version.{name}": _version(name) for name in ("vllm", "torch", "transformers", "sere")}
    return json.loads(json.dumps(values | versions))


def _version(package: str) -> str:
    """Of an installed package; vLLM has another name where it is built for CPUs."""
    for name in (package, f"{package}-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def read_similarity(path: Path | None) -> bytes:
    """The artifact's bytes; empty where none is used."""
    if path is None:
        return b""
    try:
        return (path / SIMILARITY if path.is_dir() else path).read_bytes()
    except OSError as error:
        raise ConfigError(f"artifact {path} cannot be read ({error.strerror}): give the path of one") from error
