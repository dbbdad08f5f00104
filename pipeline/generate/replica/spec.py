"""The nouns of this room: what a replica is told when it is made, and what it says of itself."""

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from sere.conf.schema import GenerateConfig
from sere.pipeline.generate.parts import Parts


@dataclass(frozen=True)
class ReplicaSpec:
    """All a replica needs to know; `ReplicaStarter` fills it."""

    name: str
    """Unique over all replicas of the job, dead ones and earlier sessions included: its parts begin with it."""
    config: GenerateConfig
    engine_arguments: dict[str, Any]
    parts: Parts
    input_schema: pa.Schema


@dataclass
class ReplicaStatus:
    """What a replica says of itself; sums are since its start. The actor fills it."""

    num_rows: int = 0
    num_errors: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    first_request: float | None = None
    """Unix time, as the next."""
    last_answer: float | None = None
    prefix_cache_queries: int = 0
    """Tokens of prompts that were looked for in the engine's prefix cache."""
    prefix_cache_hits: int = 0
    """Of those, tokens that were there."""
    num_written: int = 0
    """Rows in its parts."""
    num_steps: int = 0
    """Steps of the engine: it works, however long its answers are."""
    written: list[int] = field(default_factory=list)
    """Numbers of the batches all of whose rows are in parts."""
    first_errors: list[str] = field(default_factory=list)
    counters: dict[int, dict[str, int]] = field(default_factory=dict)
    """SERE's counters per layer, where re-routing is counted."""
