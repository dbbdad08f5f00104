"""`sere generate`."""

import math
from dataclasses import dataclass, field
from typing import Any

from sere.conf.errors import ConfigError
from sere.conf.schema.checks import at_least, one_of
from sere.conf.schema.data import DataFormat
from sere.conf.schema.engine import EngineConfig
from sere.conf.schema.reroute import RerouteConfig
from sere.conf.schema.sampling import SamplingConfig
from sere.conf.schema.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """`sere generate`: a dataset through vLLM replicas."""

    model: str
    """Folder or hub name of the model."""
    model_revision: str | None = None
    """Branch, tag or commit of a hub model; null: its main branch. It is looked up once, when the command begins; the commit
    is part of what the job is."""
    data: str
    """Files, a folder or a glob of them (parquet, JSONL, CSV, text), a Hugging Face dataset (hub name, or a folder written by
    save_to_disk), each also as an fsspec URI such as s3://bucket/prompts/*.jsonl."""
    output: str
    """Run directory: a path that all nodes see, or an fsspec URI. The same command goes on with what is there."""
    overwrite: bool = False
    """Throw away what an earlier job left in the run directory, and start anew. Applies once: interrupted, the same command
    goes on."""
    data_format: DataFormat = "auto"
    """auto (by the files' suffix), parquet, json, csv, text, or huggingface: data is a dataset's hub name or folder."""
    data_split: str = "train"
    """Split of a Hugging Face dataset."""
    data_revision: str | None = None
    """Branch, tag or commit of a hub dataset; null: its main branch. It is looked up once, when the command begins; the commit
    is part of what the job is."""
    storage_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the fsspec file systems of data and output, for example {endpoint_url: ...}. Credentials belong into the
    environment."""
    id_column: str = "id"
    """Id of a row; missing ones are made from file and row: FILE#ROW."""
    prompt_column: str = "prompt"
    """Text to continue. Text files have one row a line, in this column."""
    template: str | None = None
    """Jinja template that makes the prompt from a row's columns, instead of prompt_column: "Q: {{ question }}"."""
    messages_column: str | None = None
    """Chat messages (list of {role, content}), instead of prompt_column; the model's chat template makes them a prompt."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, for example {enable_thinking: false}."""
    sampling_column: str | None = None
    """Column of mappings (or JSON text) that override the keys of sampling for their row."""
    lora_column: str | None = None
    """Column that names the row's LoRA adapter, one of engine.lora_adapters; a row with null there gets the bare model."""
    reference_column: str = "reference"
    """Expected answer. If the data has it, exact match is computed and recorded."""
    task_column: str = "task"
    """Kind of row. If the data has it, exact match is also recorded per task."""
    batch_size: int = 64
    """Rows sent to a replica at a time."""
    concurrent_batches: int = 8
    """Batches a replica works on at once. Times batch_size it should exceed max_num_seqs, so that a free place is taken at
    once. 1 makes static batches: prompts are read together, then decoded together, and no step mixes the two."""
    num_rows: int | None = None
    """Only the first rows, for a trial; null: all."""
    order_by: tuple[str, ...] = ()
    """Columns to sort rows by before they are generated: rows decoded together that are alike, of one task say, need fewer
    experts (docs/generation.md)."""
    group_by_prefix: bool = False
    """Put rows in order of their prompts, within order_by, and send those that begin alike to the same replica, whose prefix
    cache has what they share (docs/generation.md)."""
    preserve_order: bool = False
    """Results in the input's order, written at the end; false: in the order of finishing, which saves writing them twice."""
    part_mib: float = 32
    """Size of the files of results (MiB). Finished rows are written when they make one, or sooner, as the next two keys say;
    small files become larger ones at the end."""
    checkpoint_interval_s: float = 60
    """Finished rows wait no longer than this (seconds) to be written: what is done again after a driver's death."""
    checkpoint_rows: int | None = None
    """At most so many finished rows of a replica are done again after a driver's death: it writes them when they are half as
    many. null: as many as there are."""
    max_retries: int = 3
    """Times rows are tried again after their replica died. Then they have a replica to themselves, by halves, until the row is
    found that kills it: that one is reported as an error."""
    stall_timeout_s: float = 600
    """A replica with work whose engine makes no step for so long (seconds) counts as dead: a stopped process, a hung GPU."""
    max_error_ratio: float = 0.5
    """Stop as soon as more than this share of rows (of 100 at least) failed: a template that is wrong is so for every row. 1:
    never."""
    retry_errors: bool = False
    """Do the rows again that have errors, also of a finished job. A row keeps its error until there is an answer."""
    allow_mixed_batch: bool = False
    """Let a job that re-routes go on with another max_num_seqs, batch_size, concurrent_batches, order_by or group_by_prefix
    than before: its rows have then met others in their steps, and `sere compare` does not recommend its configuration."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """What is generated for a prompt; names and meanings are those of vLLM's SamplingParams."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The vLLM replicas."""
    reroute: RerouteConfig | None = None
    """Re-routing; null: unmodified vLLM, the plugin does nothing and nothing is counted."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is recorded."""

    def __post_init__(self) -> None:
        one_of(self, "data_format")
        at_least(self, 1, "batch_size", "concurrent_batches")
        at_least(self, 0, "max_retries")
        for name in ("num_rows", "checkpoint_rows"):
            if getattr(self, name) is not None:
                at_least(self, 1, name)
        if not 0 <= self.max_error_ratio <= 1:
            raise ConfigError(f"max_error_ratio must be between 0 and 1, got {self.max_error_ratio}")
        for name in ("checkpoint_interval_s", "stall_timeout_s", "part_mib"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.template is not None and self.messages_column is not None:
            raise ConfigError("template and messages_column both make the prompt: set one of them")
        if self.group_by_prefix and self.engine.engine_kwargs.get("enable_prefix_caching", True) is False:
            raise ConfigError(
                "group_by_prefix needs the engine's prefix cache, which engine.engine_kwargs.enable_prefix_caching=false turns "
                "off: leave out one of them"
            )
        if self.lora_column is not None and not self.engine.lora_adapters:
            raise ConfigError("lora_column needs engine.lora_adapters: name the adapters")
