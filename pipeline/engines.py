"""What has to be right before engines start: the model, the settings, the cluster; and the arguments engines get."""

from dataclasses import dataclass
from typing import Any

from calibration_jobs.cluster import start_ray
from calibration_jobs.models import read_model_config
from conf.schema import ConfigError, GenerateConfig, RerouteConfig

# What model families call the number of experts a token is sent to.
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")


@dataclass(frozen=True)
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

    model_config = read_model_config(config.model, trust_remote_code=config.engine.trust_remote_code)
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


def find_gpus(config: GenerateConfig) -> bool:
    """Join or start a Ray cluster; returns whether it has GPUs.

    Raises:
        ConfigError: if the replicas do not fit.
    """
    import ray

    cpus = config.engine.replicas * config.engine.tensor_parallel_size * config.engine.cpus_per_replica
    start_ray(cpus)
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
