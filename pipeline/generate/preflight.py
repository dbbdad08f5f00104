"""What has to be right before engines start: the model, the settings, the cluster; and the arguments engines get."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sere.calibration_jobs.workers.model import read_model_config
from sere.calibration_jobs.workers.pool import start_ray
from sere.conf.errors import ConfigError
from sere.conf.schema import GenerateConfig, RerouteConfig
from sere.pipeline.generate.parts import RunFolder

if TYPE_CHECKING:
    import pyarrow as pa

# What model families call the number of experts a token is sent to.
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model without loading it."""

    top_k: int | None
    """Experts a token is sent to; None if its configuration does not say."""


def read_model_facts(config: GenerateConfig) -> ModelFacts:
    """Read the model's configuration files.

    Raises:
        ConfigError: if there is no such model, or it has no chat template and needs one.
    """
    model_config = read_model_config(config.model, trust_remote_code=config.engine.trust_remote_code)
    if config.messages_column is not None:
        _check_chat_template(config)
    text_config = model_config.get_text_config()
    return ModelFacts(next((getattr(text_config, name) for name in _TOP_K_NAMES if getattr(text_config, name, None)), None))


def _check_chat_template(config: GenerateConfig) -> None:
    from transformers import AutoTokenizer

    if {"tokenizer", "tokenizer_mode"} & set(config.engine.engine_kwargs):
        # vLLM knows, and says so row by row.
        return
    tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=config.engine.trust_remote_code)
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(f"{config.model} has no chat template, which messages_column needs: use prompt_column or template")


def check_reroute(config: RerouteConfig, model: str, facts: ModelFacts) -> None:
    """Refuse settings that every engine would refuse at its start.

    Raises:
        ConfigError, SimilarityError: as the engine would.
    """
    if config.policy != "none" and facts.top_k is not None and config.primary_top_k > facts.top_k:
        raise ConfigError(f"primary_top_k must be between 1 and the model's top_k ({facts.top_k}), got {config.primary_top_k}")
    if config.policy == "sere":
        from sere.ops.model_digest import model_digest
        from sere.ops.similarity import SimilarityArtifact

        artifact = SimilarityArtifact.load(config.similarity)
        digest = model_digest(model) if config.check_model else None
        artifact.check_model(num_experts=artifact.num_experts, digest=digest)
        artifact.matrix(artifact.layers[0], config.metric)


def engine_kwargs(config: GenerateConfig, reroute: RerouteConfig | None, *, on_gpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's engine."""
    engine = config.engine
    arguments: dict[str, Any] = {
        "model": config.model,
        "dtype": engine.dtype,
        "max_num_seqs": engine.max_num_seqs,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "pipeline_parallel_size": engine.pipeline_parallel_size,
        "enforce_eager": engine.enforce_eager,
        "trust_remote_code": engine.trust_remote_code,
    }
    several = "mp" if engine.executor == "auto" else engine.executor
    # One device needs no worker process beside the engine's.
    arguments["distributed_executor_backend"] = several if _num_devices(config) > 1 else "uni"
    if engine.max_model_len is not None:
        arguments["max_model_len"] = engine.max_model_len
    if engine.lora_adapters:
        arguments |= {"enable_lora": True, "max_loras": len(engine.lora_adapters), "max_lora_rank": engine.max_lora_rank}
    if not on_gpu:
        arguments["kv_cache_memory_bytes"] = int(engine.kv_cache_gib * 2**30)
    arguments |= engine.engine_kwargs
    if reroute is not None:
        arguments["additional_config"] = {**arguments.get("additional_config", {}), "sere": reroute.to_dict()}
    return arguments


def _num_devices(config: GenerateConfig) -> int:
    return config.engine.tensor_parallel_size * config.engine.pipeline_parallel_size


def _gpus_per_replica(config: GenerateConfig) -> float:
    given = config.engine.gpus_per_replica
    return float(_num_devices(config)) if given is None else given


def join_cluster(config: GenerateConfig) -> bool:
    """Join or start a Ray cluster; returns whether its replicas run on GPUs.

    Raises:
        ConfigError: if the replicas the job needs do not fit a machine of its own, which cannot grow.
    """
    import ray

    engine = config.engine
    cpus = engine.num_replicas * engine.cpus_per_replica
    # Reading and writing take a core beside the replicas.
    start_ray((engine.max_replicas or engine.num_replicas) * engine.cpus_per_replica + 1)
    resources = ray.cluster_resources()
    on_gpu = resources.get("GPU", 0) > 0 and _gpus_per_replica(config) > 0
    if os.environ.get("RAY_ADDRESS"):
        return on_gpu
    gpus = engine.num_replicas * _gpus_per_replica(config)
    if on_gpu and resources["GPU"] < gpus:
        raise ConfigError(
            f"{engine.num_replicas} replicas of {_gpus_per_replica(config):g} GPUs need {gpus:g} GPUs, this machine has "
            f"{resources['GPU']:g}: lower engine.num_replicas, or set RAY_ADDRESS to join a cluster"
        )
    if resources.get("CPU", 0) < cpus + 1:
        raise ConfigError(
            f"{engine.num_replicas} replicas need {cpus:g} cores and one to read and write, Ray has "
            f"{resources.get('CPU', 0):g}: lower engine.num_replicas or engine.cpus_per_replica"
        )
    return on_gpu


class ReplicaStarter:
    """Starts and ends the Ray actors of replicas."""

    def __init__(
        self,
        config: GenerateConfig,
        arguments: dict[str, Any],
        folder: RunFolder,
        input_schema: "pa.Schema",
        *,
        session: int,
        on_gpu: bool,
    ) -> None:
        """Args:
        config: Of the job.
        arguments: Of the engines.
        folder: Where they write.
        input_schema: The input's columns.
        session: Number of this driver's session: part of the replicas' names, which no other session's may have.
        on_gpu: Whether they take GPUs.
        """
        self._config, self._arguments, self._on_gpu = config, arguments, on_gpu
        self._folder, self._input_schema = folder.for_replicas(), input_schema
        self._session = session
        self._groups: dict[Any, Any] = {}

    def start(self, number: int) -> tuple[str, Any]:
        """Start a replica; returns its name and the actor, which waits for room in the cluster if need be."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from sere.pipeline.generate.replica.actor import Replica, ReplicaSpec

        engine = self._config.engine
        name = f"s{self._session:04d}-r{number:04d}"
        spec = ReplicaSpec(name, self._config, self._arguments, self._folder, self._input_schema)
        options: dict[str, Any] = {"num_cpus": engine.cpus_per_replica, "max_restarts": 0, "max_concurrency": 1000}
        group = None
        if self._on_gpu:
            accelerator = {f"accelerator_type:{engine.accelerator_type}": 0.001} if engine.accelerator_type else {}
            if engine.executor == "ray" and _num_devices(self._config) > 1:
                # A replica over nodes: vLLM starts a worker in each bundle, and Ray keeps the bundles together.
                bundle = {"GPU": 1, "CPU": engine.cpus_per_replica, **accelerator}
                group = placement_group([bundle] * _num_devices(self._config), strategy="PACK")
                strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
                options |= {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": strategy}
            else:
                options |= {"num_gpus": _gpus_per_replica(self._config), "resources": accelerator}
        actor = ray.remote(Replica).options(**options).remote(spec)
        if group is not None:
            self._groups[actor] = group
        return name, actor

    def end(self, actor: Any) -> None:
        """End a replica, dead or alive, and free what it held."""
        import ray
        from ray.util import remove_placement_group

        ray.kill(actor)
        if actor in self._groups:
            remove_placement_group(self._groups.pop(actor))
