"""`sere calibrate`, and how its matrices are judged."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from sere.conf.errors import ConfigError
from sere.conf.schema.checks import at_least, one_of
from sere.conf.schema.data import DataFormat
from sere.conf.schema.named import NAMED
from sere.conf.schema.rules import METRICS, Metric
from sere.conf.schema.tracking import TrackingConfig

TABLES = ("norms", "protected", "beta", "folds", "means", "surrogates")
"""What calibration can tell of a layer beside similarities; docs/calibration.md has the formulae."""


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
    """Decode batches of the teacher-forced emulation (perplexity, KL, agreement). []: no emulation."""
    policies: tuple[str, ...] = ("sere", "sere_t", "oea", "top_k", "random")
    """Policies that are emulated, beside the unmodified model, at each of primary_top_k: of sere, sere_t, oea, top_k, random;
    sere with every metric. Those whose tables are not made are left out."""
    metric: Metric = "cosine"
    """The metric whose figures stand for the artifact, in its tags and in promote_if."""
    reference_batch_size: int = 16
    """Decode batch of those figures; one of batch_sizes."""
    reference_primary_top_k: int = 2
    """S of those figures; one of primary_top_k."""
    num_random: int = 3
    """Random similarities that the control is averaged over."""
    seed: int = 0
    """Seed of the first of them."""

    def __post_init__(self) -> None:
        one_of(self, "metric")
        unknown = [name for name in self.policies if name not in NAMED or NAMED[name].votes["rule"] != "top"]
        if unknown:
            valid = ", ".join(name for name, named in NAMED.items() if named.votes["rule"] == "top")
            raise ConfigError(f"judge.policies must be some of {valid}, got {unknown[0]!r}")
        at_least(self, 0, "held_out_rows")
        at_least(self, 1, "num_random")
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
    model_revision: str | None = None
    """Branch, tag or commit of a hub model; null: its main branch. It is looked up once, when the command begins; the commit
    is part of what the job is."""
    data: str
    """Text: files, a folder or a glob of them (parquet, JSONL, CSV, text; one text per row), or a Hugging Face dataset (hub
    name, or a folder written by save_to_disk), each also as an fsspec URI such as s3://bucket/text/*.jsonl."""
    output: str
    """Similarity artifact to write; the file's name is always similarity.safetensors. What the job needs to resume is kept
    beside it, in calibration/."""
    overwrite: bool = False
    """Throw away what an earlier job of this output left, and start anew. Applies once: interrupted, the same command goes
    on."""
    data_format: DataFormat = "auto"
    """auto (by the files' suffix), parquet, json, csv, text, or huggingface: data is a dataset's hub name or folder."""
    data_split: str = "train"
    """Split of a Hugging Face dataset."""
    data_revision: str | None = None
    """Branch, tag or commit of a hub dataset; null: its main branch. It is looked up once, when the command begins."""
    storage_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the fsspec file system of data, for example {endpoint_url: ...}. Credentials belong into the
    environment."""
    text_column: str = "text"
    """Column of the text. Text files have one row a line, in this column."""
    domain_column: str | None = None
    """Column that names each row's domain: measures whether one domain's matrices serve another. null: one domain."""
    metrics: tuple[str, ...] = METRICS
    """Similarity metrics to compute: some of frobenius, cosine, cka, and weights, which needs no text."""
    tables: tuple[str, ...] = TABLES
    """What else policies may need, from the same pass over the text: some of norms, protected, beta, folds, means and
    surrogates. []: similarities only."""
    surrogate_rank: int = 2
    """Highest rank of the surrogates, 1 to 64; the artifact holds every rank up to it."""
    surrogate_directions: int = 128
    """Most directions of a layer's input that surrogates are fitted on; wider models are first projected on their leading
    ones. Sums grow with its square."""
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
    """Bytes for one block's outputs of all experts and the metrics' copies; fewer make smaller blocks."""
    num_workers: int = 1
    """Ray actors, each with its own copy of the model."""
    num_cpus_per_worker: float = 1
    """CPU cores Ray reserves for a worker."""
    num_gpus_per_worker: float = 0
    """GPUs Ray reserves for a worker; 0 runs on the CPU."""
    max_memory_gib: float | None = None
    """Memory for a worker's weights; what does not fit is read from disk at each use. null: the whole model is loaded."""
    offload_folder: str | None = None
    """Folder on each worker's machine for weights that have to be rewritten before they can be read layer by layer (up to the
    model's size). null: the system's temporary folder."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """auto (the checkpoint's), float32, bfloat16 or float16."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you trust it."""
    registered_model: str | None = None
    """Name in the MLflow model registry under which the artifact becomes a new version, with alias candidate. null: sere- and
    the model's name."""
    promote_if: Literal["never", "lower_held_out_error"] = "never"
    """When alias champion moves to the new version: never (only `sere artifact promote` moves it), or lower_held_out_error:
    if its held-out error is below the champion's, on the same held-out rows."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """How good the matrices are, measured on rows that are held out of calibration."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is recorded."""

    def __post_init__(self) -> None:
        one_of(self, "data_format", "dtype", "promote_if")
        at_least(self, 1, "num_sequences", "batch_size", "shard_rows", "num_workers", "max_activation_bytes")
        at_least(self, 4, "sequence_length", "block_tokens")
        at_least(self, 0, "num_cpus_per_worker", "num_gpus_per_worker")
        if self.registered_model is not None and set(self.registered_model) & set("/:"):
            raise ConfigError(f"registered_model must have no / or :, got {self.registered_model!r}")
        if self.max_memory_gib is not None and not 0 < self.max_memory_gib < math.inf:
            raise ConfigError(f"max_memory_gib must be above 0, got {self.max_memory_gib}")
        if not self.metrics or not set(self.metrics) <= set(METRICS):
            raise ConfigError(f"metrics must be some of {', '.join(METRICS)}, got {list(self.metrics)}")
        if not set(self.tables) <= set(TABLES):
            raise ConfigError(f"tables must be some of {', '.join(TABLES)}, got {list(self.tables)}")
        if not 1 <= self.surrogate_rank <= min(64, self.surrogate_directions):
            raise ConfigError(
                f"surrogate_rank must be between 1 and 64 and at most surrogate_directions={self.surrogate_directions}, got "
                f"{self.surrogate_rank}"
            )
        if self.judge.held_out_rows and self.judge.metric not in self.metrics:
            raise ConfigError(f"judge.metric {self.judge.metric!r} must be one of metrics ({', '.join(self.metrics)})")
        if self.promote_if != "never" and not self.judge.held_out_rows:
            raise ConfigError(f"promote_if={self.promote_if} needs held-out rows: set judge.held_out_rows")
