"""The vLLM replicas."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from sere.conf.errors import ConfigError
from sere.conf.schema.checks import at_least, one_of

# Arguments of vLLM's that settings here make; given twice, the run would be recorded under one and made with the other.
_OWNED = {
    "model": "model",
    "max_num_seqs": "engine.max_num_seqs",
    "max_model_len": "engine.max_model_len",
    "dtype": "engine.dtype",
    "tensor_parallel_size": "engine.tensor_parallel_size",
    "pipeline_parallel_size": "engine.pipeline_parallel_size",
    "distributed_executor_backend": "engine.executor",
    "enforce_eager": "engine.enforce_eager",
    "trust_remote_code": "engine.trust_remote_code",
    "enable_lora": "engine.lora_adapters",
    "max_loras": "engine.lora_adapters",
    "max_lora_rank": "engine.max_lora_rank",
}
# More would be a slip of the hand.
_MOST_REPLICAS = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The vLLM replicas."""

    num_replicas: int = 1
    """vLLM replicas the job needs to begin with; where nothing else is said, all it uses."""
    max_replicas: int | None = None
    """Further replicas are started, up to this many, as the cluster has or gets room for them. null: num_replicas."""
    max_num_seqs: int = 32
    """Sequences decoded together in one replica: the decode batch that quality figures refer to."""
    max_model_len: int | None = None
    """Context length; null: the model's."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto (the checkpoint's), float32, bfloat16 or float16."""
    tensor_parallel_size: int = 1
    """GPUs (on the CPU: processes) that each layer of a replica is split over."""
    pipeline_parallel_size: int = 1
    """Groups of them that a replica's layers are divided among."""
    executor: Literal["auto", "mp", "ray"] = "auto"
    """How a replica of several GPUs runs: mp, all on one node; ray, also over nodes; auto: mp."""
    enforce_eager: bool = False
    """Skip torch.compile and CUDA graphs: starts faster, decodes slower."""
    gpus_per_replica: float | None = None
    """GPUs Ray reserves for a replica; null: tensor_parallel_size times pipeline_parallel_size if the cluster has GPUs, else
    0. A fraction shares a GPU: then lower gpu_memory_utilization in engine_kwargs."""
    accelerator_type: str | None = None
    """Ray accelerator type of the GPUs wanted, for example H200; null: any."""
    cpus_per_replica: float = 1
    """CPU cores Ray reserves for a replica."""
    kv_cache_gib: float = 1.0
    """KV cache of a replica on the CPU; on a GPU vLLM sizes it itself."""
    lora_adapters: dict[str, str] = field(default_factory=dict)
    """LoRA adapters by name: folder, or hub name."""
    max_lora_rank: int = 16
    """Highest rank among the adapters."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you trust it."""
    engine_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine, as they are; none that a setting here makes."""

    def __post_init__(self) -> None:
        one_of(self, "dtype", "executor")
        at_least(self, 1, "num_replicas", "max_num_seqs", "tensor_parallel_size", "pipeline_parallel_size", "max_lora_rank")
        if max(self.num_replicas, self.max_replicas or 0) > _MOST_REPLICAS:
            asked = max(self.num_replicas, self.max_replicas or 0)
            raise ConfigError(f"num_replicas and max_replicas must be at most {_MOST_REPLICAS}, got {asked}")
        if self.max_model_len is not None:
            at_least(self, 1, "max_model_len")
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ConfigError(f"max_replicas ({self.max_replicas}) must not be below num_replicas ({self.num_replicas})")
        if self.gpus_per_replica is not None and not 0 <= self.gpus_per_replica < math.inf:
            raise ConfigError(f"gpus_per_replica must be at least 0, got {self.gpus_per_replica}")
        for name in ("kv_cache_gib", "cpus_per_replica"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name, setting in _OWNED.items():
            if name in self.engine_kwargs:
                raise ConfigError(f"engine_kwargs.{name} is what {setting} says: set that one instead")
        additional = self.engine_kwargs.get("additional_config")
        if isinstance(additional, dict) and "sere" in additional:
            raise ConfigError("engine_kwargs.additional_config.sere is what reroute says: set that one instead")
