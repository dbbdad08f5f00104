"""The configuration of every job, as frozen dataclasses. Their fields are the keys of the YAML files beside this one.

Owns names, defaults and the checks that need nothing but the values themselves. Imports only the standard library: the
vLLM plugin reads `RerouteConfig` in every engine process.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

METRICS = ("frobenius", "cosine", "cka", "weights")
Metric = Literal["frobenius", "cosine", "cka", "weights"]
PolicyName = Literal["none", "sere", "top_k", "random"]
DataFormat = Literal["auto", "parquet", "json", "csv", "text", "huggingface"]


class ConfigError(ValueError):
    """A setting or an input that the user has to change. The message names the value and the remedy, in one line."""


def unknown_key(key: str, valid: list[str], where: str) -> ConfigError:
    """The error for a key that does not exist, with the nearest one that does."""
    close = difflib.get_close_matches(key.rsplit(".", 1)[-1], valid, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"valid keys: {', '.join(sorted(valid))}"
    return ConfigError(f"unknown key {key!r} in {where}: {hint}")


def _at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")


def _one_of(config: Any, *names: str) -> None:
    hints = get_type_hints(type(config))
    for name in names:
        value, valid = getattr(config, name), get_args(hints[name])
        if value not in valid:
            raise ConfigError(f"{name} must be one of {', '.join(valid)}, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RerouteConfig:
    """How a replica re-routes: vLLM's `additional_config["sere"]`, and the `reroute` section of a generate config."""

    policy: PolicyName = "sere"
    """none: count only; sere: to the most similar primary expert; top_k: drop all but primary_top_k slots; random: to a
    random primary expert."""
    similarity: str | None = None
    """Similarity artifact: a path, or, in a generate config, models:/NAME@ALIAS. Needed by policy sere."""
    metric: Metric = "cosine"
    """Which of the artifact's matrices to use."""
    primary_top_k: int = 2
    """Slots per decode row whose experts are primary (the paper's S): 1 to the model's top_k."""
    threshold: float = 0.5
    """Least similarity that re-routes (the paper's rho), 0 to 1. Useful values depend on the metric."""
    phase: Literal["decode", "all"] = "decode"
    """decode: prompts are never touched; all: prompt rows are treated as decode rows (the paper)."""
    min_tokens: int = 4
    """Steps with fewer decode rows than this are left alone: there is nothing to save, and quality suffers most."""
    max_tokens: int = 1024
    """Steps with more rows than this are left alone."""
    seed: int = 0
    """Seed of policy random."""
    check_model: bool = True
    """Refuse an artifact computed from other weights than the model's. Off: only layer and expert counts must match."""
    stats_dir: str | None = None
    """Folder for the counters (one pair of files per engine worker). None: nothing is counted. `sere generate` sets it."""

    def __post_init__(self) -> None:
        _one_of(self, "policy", "metric", "phase")
        _at_least(self, 1, "primary_top_k", "min_tokens", "max_tokens")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold must be between 0 and 1, got {self.threshold}")
        if self.policy == "sere" and not self.similarity:
            raise ConfigError("policy 'sere' needs similarity: the path of an artifact made by `sere calibrate`")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RerouteConfig":
        """Build from `additional_config["sere"]`; an unknown key or a value of the wrong type is a ConfigError."""
        hints = get_type_hints(cls)
        for key, value in values.items():
            if key not in hints:
                raise unknown_key(key, list(hints), "additional_config['sere']")
            expected = {float: (int, float)}.get(hints[key], hints[key])
            if isinstance(expected, (type, tuple)) and (
                not isinstance(value, expected) or (isinstance(value, bool) and hints[key] is not bool)
            ):
                raise ConfigError(f"{key} must be {hints[key].__name__}, got {value!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where runs are recorded."""

    uri: str | None = "sqlite:///runs/mlflow.db"
    """MLflow tracking URI; empty: record nothing."""
    experiment: str = "sere"
    run_name: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeConfig:
    """How good an artifact's matrices are, measured on rows that were held out of calibration."""

    held_out_rows: int = 128
    """Rows held out, spread evenly over the data. 0: nothing is measured on held-out text."""
    batch_sizes: tuple[int, ...] = (4, 16, 64)
    """Decode batches for which the error of re-routed layers is measured."""
    primary_top_k: tuple[int, ...] = (1, 2, 4)
    """Values of S; those not below the model's top_k are left out, as they re-route nothing."""
    threshold_quantiles: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Thresholds beside 0: these quantiles of each metric's off-diagonal similarities."""
    emulate_batch_sizes: tuple[int, ...] = (16,)
    """Decode batches of the teacher-forced emulation (perplexity, KL, agreement). Empty: no emulation."""
    metric: Metric = "cosine"
    """The metric whose figures stand for the artifact, in its tags and in `promote_if`."""
    reference_batch_size: int = 16
    """Decode batch of those figures; one of `batch_sizes`."""
    reference_primary_top_k: int = 2
    """S of those figures; one of `primary_top_k`."""
    num_random: int = 3
    """Random similarities that the control is averaged over."""
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of(self, "metric")
        _at_least(self, 0, "held_out_rows")
        _at_least(self, 1, "num_random")
        for name in ("batch_sizes", "primary_top_k", "emulate_batch_sizes"):
            if any(value < 1 for value in getattr(self, name)):
                raise ConfigError(f"judge.{name} must all be at least 1, got {list(getattr(self, name))}")
        if not all(0 <= quantile <= 1 for quantile in self.threshold_quantiles):
            raise ConfigError(f"judge.threshold_quantiles must be between 0 and 1, got {list(self.threshold_quantiles)}")
        for name, value in (("batch_sizes", self.reference_batch_size), ("primary_top_k", self.reference_primary_top_k)):
            if value not in getattr(self, name):
                key = "reference_batch_size" if name == "batch_sizes" else "reference_primary_top_k"
                raise ConfigError(f"judge.{key} must be one of judge.{name} {list(getattr(self, name))}, got {value}")
        largest = max((*self.batch_sizes, *self.emulate_batch_sizes))
        if 0 < self.held_out_rows < largest:
            raise ConfigError(
                f"judge.held_out_rows must be at least the largest batch ({largest}), got {self.held_out_rows}: hold out more "
                "rows, take smaller judge.batch_sizes, or turn judging off with judge.held_out_rows=0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateConfig:
    """`sere calibrate`: expert similarity of one model from calibration text."""

    model: str
    """Folder or hub name of a Transformers MoE model."""
    data: str
    """Parquet or JSONL file, folder or glob with one text per row."""
    output: str
    """Similarity artifact to write (.safetensors). What the job needs to resume is kept beside it, in `calibration/`."""
    overwrite: bool = False
    """Throw away what an earlier job of this output left, and start anew."""
    text_column: str = "text"
    domain_column: str | None = None
    """Column that names each row's domain, for measuring transfer between domains. None: one domain."""
    metrics: tuple[str, ...] = METRICS
    """Some of frobenius, cosine, cka and weights."""
    num_sequences: int = 528
    """Usable rows that are read, in order, held-out ones included; fewer if the data has fewer."""
    sequence_length: int = 128
    """Tokens per row; longer rows are cut, shorter ones padded (padding does not count)."""
    batch_size: int = 32
    """Rows per forward pass. Larger ones read offloaded weights less often."""
    shard_rows: int = 32
    """Rows of a shard: what one worker does at a time, and what is lost at most when it dies."""
    block_tokens: int = 256
    """Tokens whose outputs of all experts are compared at once: the minibatch of the CKA estimate."""
    max_activation_bytes: int = 1 << 30
    """Budget for one block's outputs of all experts and the metrics' copies; a smaller one makes smaller blocks."""
    num_workers: int = 1
    """Ray actors, each with its own copy of the model."""
    num_cpus_per_worker: float = 1
    num_gpus_per_worker: float = 0
    max_memory_gib: float | None = None
    """Memory for a worker's weights; what does not fit is read from disk at each use. None: the whole model is loaded."""
    offload_folder: str | None = None
    """Folder on each worker's machine for weights that have to be rewritten before they can be read layer by layer (up to the
    model's size). None: the system's temporary folder."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False
    registered_model: str | None = None
    """Name in the MLflow model registry under which the artifact becomes a new version; None: sere- and the model's name."""
    promote_if: Literal["never", "lower_held_out_error"] = "never"
    """When alias champion moves to the new version: never (only `sere calibrate promote` moves it), or if its held-out error
    is lower than the champion's on the same held-out rows."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        _one_of(self, "dtype", "promote_if")
        _at_least(self, 1, "num_sequences", "batch_size", "shard_rows", "num_workers", "max_activation_bytes")
        _at_least(self, 4, "sequence_length", "block_tokens")
        _at_least(self, 0, "num_cpus_per_worker", "num_gpus_per_worker")
        if self.registered_model is not None and set(self.registered_model) & set("/:"):
            raise ConfigError(f"registered_model must have no / or :, got {self.registered_model!r}")
        if self.max_memory_gib is not None and not 0 < self.max_memory_gib < math.inf:
            raise ConfigError(f"max_memory_gib must be above 0, got {self.max_memory_gib}")
        if not self.metrics or not set(self.metrics) <= set(METRICS):
            raise ConfigError(f"metrics must be some of {', '.join(METRICS)}, got {list(self.metrics)}")
        if self.judge.held_out_rows and self.judge.metric not in self.metrics:
            raise ConfigError(f"judge.metric {self.judge.metric!r} must be one of metrics ({', '.join(self.metrics)})")
        if self.promote_if != "never" and not self.judge.held_out_rows:
            raise ConfigError(f"promote_if={self.promote_if} needs held-out rows: set judge.held_out_rows")


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputConfig:
    """What every answer must look like; exactly one of these. Names are vLLM's `StructuredOutputsParams`."""

    json: Any = None
    """A JSON schema, as a mapping or as text."""
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    """In EBNF."""

    def __post_init__(self) -> None:
        if sum(getattr(self, field.name) is not None for field in dataclasses.fields(self)) != 1:
            raise ConfigError("structured_output needs exactly one of json, regex, choice and grammar")

    def to_dict(self) -> dict[str, Any]:
        """The one constraint that is set, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if name == "choice" else value for name, value in values.items() if value is not None}


# What vLLM can send to its engine.
_INTEGERS = (
    ("max_tokens", 1, 2**31 - 1),
    ("min_tokens", 0, 2**31 - 1),
    ("top_k", 0, 2**31 - 1),
    ("stop_token_ids", 0, 2**31 - 1),
    ("seed", -(2**63), 2**63 - 1),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """What is generated for a prompt. Names and meanings are vLLM's `SamplingParams`."""

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    structured_output: StructuredOutputConfig | None = None

    def __post_init__(self) -> None:
        for name, least, most in _INTEGERS:
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                if one is not None and not least <= one <= most:
                    raise ConfigError(f"{name} must be between {least} and {most}, got {str(one)[:30]}")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be between 0 and 1, got {self.min_p}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ConfigError(f"{name} must be between -2 and 2, got {getattr(self, name)}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if self.min_tokens > self.max_tokens:
            raise ConfigError(f"min_tokens ({self.min_tokens}) must not be above max_tokens ({self.max_tokens})")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The vLLM replicas."""

    num_replicas: int = 1
    """Replicas the job needs to begin with; where nothing else is said, all it uses."""
    max_replicas: int | None = None
    """Further replicas are started, up to this many, as the cluster has or gets room for them. None: num_replicas."""
    max_num_seqs: int = 32
    """Sequences decoded together in one replica: the decode batch that quality figures refer to."""
    max_model_len: int | None = None
    """Context length; None: the model's."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    executor: Literal["auto", "mp", "ray"] = "auto"
    """How a replica of several GPUs runs: mp, all on one node; ray, also over nodes; auto: mp."""
    enforce_eager: bool = False
    """Skip torch.compile and CUDA graphs: starts faster, decodes slower."""
    gpus_per_replica: float | None = None
    """GPUs Ray reserves for a replica; None: tensor_parallel_size times pipeline_parallel_size if the cluster has GPUs, else 0.
    A fraction shares a GPU: then lower gpu_memory_utilization in engine_kwargs."""
    accelerator_type: str | None = None
    """Ray accelerator type of the GPUs wanted, for example H200; None: any."""
    cpus_per_replica: float = 1
    """CPU cores Ray reserves for a replica."""
    kv_cache_gib: float = 1.0
    """KV cache of a replica on the CPU; on a GPU vLLM sizes it itself."""
    lora_adapters: dict[str, str] = field(default_factory=dict)
    """LoRA adapters by name: folder, or hub name."""
    max_lora_rank: int = 16
    trust_remote_code: bool = False
    engine_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine, as they are."""

    def __post_init__(self) -> None:
        _one_of(self, "dtype", "executor")
        _at_least(self, 1, "num_replicas", "max_num_seqs", "tensor_parallel_size", "pipeline_parallel_size", "max_lora_rank")
        if self.max_model_len is not None:
            _at_least(self, 1, "max_model_len")
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ConfigError(f"max_replicas ({self.max_replicas}) must not be below num_replicas ({self.num_replicas})")
        if self.gpus_per_replica is not None and not 0 <= self.gpus_per_replica < math.inf:
            raise ConfigError(f"gpus_per_replica must be at least 0, got {self.gpus_per_replica}")
        for name in ("kv_cache_gib", "cpus_per_replica"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """`sere generate`: a dataset through vLLM replicas."""

    model: str
    """Folder or hub name of the model."""
    data: str
    """Files, a folder or a glob of them (parquet, JSONL, CSV, text), a Hugging Face dataset (hub name, or a folder written by
    `save_to_disk`), each also as an fsspec URI such as s3://bucket/prompts/*.jsonl."""
    output: str
    """Run directory: a path that all nodes see, or an fsspec URI. The same command goes on with what is there."""
    overwrite: bool = False
    """Throw away what the run directory holds, and start anew."""
    data_format: DataFormat = "auto"
    """auto: by the files' suffix; huggingface: `data` is a dataset's hub name or folder."""
    data_split: str = "train"
    """Split of a Hugging Face dataset."""
    data_revision: str | None = None
    """Revision of a hub dataset."""
    storage_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the fsspec file systems of `data` and `output`, for example {endpoint_url: ...}. Credentials belong into the
    environment."""
    id_column: str = "id"
    """Missing ids are made from file and row: FILE#ROW."""
    prompt_column: str = "prompt"
    """Text to continue. Text files have one row a line, in this column."""
    template: str | None = None
    """Jinja template that makes the prompt from a row's columns, instead of prompt_column: "Q: {{ question }}"."""
    messages_column: str | None = None
    """Chat messages (list of {role, content}), which the model's chat template makes a prompt, instead of prompt_column."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, for example {enable_thinking: false}."""
    sampling_column: str | None = None
    """Column of mappings (or JSON text) that override `sampling` for their row."""
    lora_column: str | None = None
    """Column that names the row's LoRA adapter, one of engine.lora_adapters; null: the bare model."""
    reference_column: str = "reference"
    """If the data has it, exact match is computed and recorded."""
    task_column: str = "task"
    """If the data has it, exact match is also recorded per task."""
    batch_size: int = 64
    """Rows sent to a replica at a time."""
    concurrent_batches: int = 8
    """Batches a replica works on at once. Times batch_size it should exceed max_num_seqs, so that a free place is taken at
    once. 1 makes static batches: prompts are read together, then decoded together, and no step mixes the two."""
    num_rows: int | None = None
    """Only the first rows, for a trial; None: all."""
    order_by: tuple[str, ...] = ()
    """Columns to sort rows by before they are generated, so that rows of a batch are alike (docs/generation.md)."""
    preserve_order: bool = False
    """Write the results in the input's order, at the end; the order of finishing otherwise."""
    checkpoint_rows: int = 256
    """At most so many finished rows of a replica are done again after a driver's death: it writes them when they are half as
    many."""
    checkpoint_interval_s: float = 60
    """Finished rows wait no longer than this to be written."""
    max_retries: int = 3
    """Times a row is tried again after its replica died; then it is reported as an error."""
    max_error_ratio: float = 1.0
    """Stop as soon as more than this share of rows (of 100 at least) failed. 1: never."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    reroute: RerouteConfig | None = None
    """None: unmodified vLLM, the plugin does nothing and nothing is counted."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        _one_of(self, "data_format")
        _at_least(self, 1, "batch_size", "concurrent_batches", "checkpoint_rows")
        _at_least(self, 0, "max_retries")
        if self.num_rows is not None:
            _at_least(self, 1, "num_rows")
        if not 0 <= self.max_error_ratio <= 1:
            raise ConfigError(f"max_error_ratio must be between 0 and 1, got {self.max_error_ratio}")
        if not 0 < self.checkpoint_interval_s < math.inf:
            raise ConfigError(f"checkpoint_interval_s must be above 0, got {self.checkpoint_interval_s}")
        if self.template is not None and self.messages_column is not None:
            raise ConfigError("template and messages_column both make the prompt: set one of them")
        if self.lora_column is not None and not self.engine.lora_adapters:
            raise ConfigError("lora_column needs engine.lora_adapters: name the adapters")


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """`sere sweep`: one generate job per combination of settings, and their comparison."""

    base: str
    """YAML file of the generate job that all have in common."""
    output: str
    """Folder, or fsspec URI: each configuration gets a run directory below. The same command goes on with what is there."""
    grid: dict[str, Any]
    """Values by key of the generate config: {reroute.primary_top_k: [1, 2]}. All combinations are run, and unmodified vLLM
    beside them. Combinations that differ only in settings that their policy ignores are run once."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Settings of the generate config that differ from `base` in every run."""
    report: str = "runs"
    """Local folder for the comparison's table, picture and page."""
    max_loss: float = 0.02
    """Quality loss allowed for the recommended configuration."""
    by: Literal["speed", "active_experts"] = "speed"
    """What it is chosen by."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        _one_of(self, "by")
        if not 0 <= self.max_loss <= 1:
            raise ConfigError(f"max_loss must be between 0 and 1, got {self.max_loss}")
        if not self.grid:
            raise ConfigError("grid must name a setting, for example {reroute.primary_top_k: [1, 2]}")
