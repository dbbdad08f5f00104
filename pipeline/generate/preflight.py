"""What has to be right before engines start: the model, the settings, the cluster; and the arguments engines get."""

import dataclasses
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere.conf.errors import ConfigError
from sere.conf.schema import GenerateConfig, RerouteConfig
from sere.pipeline.generate.identity import read_similarity
from sere.pipeline.generate.replica.starter import gpus_per_replica, num_devices
from sere.pipeline.runtime.cluster import refuse_missing_room, start_ray
from sere.pipeline.runtime.job_folder import JOB_FILE
from sere.pipeline.runtime.model_facts import ModelFacts, read_model_facts
from sere.pipeline.runtime.storage import Storage
from sere.pipeline.tracking.registry import resolve_artifact, resolve_version

_log = logging.getLogger(__name__)


def read_facts(config: GenerateConfig) -> ModelFacts:
    """Read the model's configuration files.

    Raises:
        ConfigError: if there is no such model or revision, engine_kwargs name another, or it has no chat template and needs
            one.
    """
    trust = config.engine.trust_remote_code
    facts = read_model_facts(config.model, revision=config.model_revision, trust_remote_code=trust)
    _revisions(config, facts.commit)
    if config.messages_column is not None:
        _check_chat_template(config, facts.commit)
    return facts


def _revisions(config: GenerateConfig, commit: str | None) -> dict[str, str]:
    """The engine's arguments that say which commit of a hub model it is; none for a folder."""
    if commit is None:
        return {}
    given = config.engine.engine_kwargs
    # vLLM would look for the model's commit in another tokenizer's repository, too.
    own_tokenizer = given.get("tokenizer") in (None, config.model)
    for key in ("revision", "tokenizer_revision") if own_tokenizer else ("revision",):
        if given.get(key) not in (None, commit):
            raise ConfigError(
                f"engine.engine_kwargs.{key}={given[key]} is not the model's commit ({commit}): leave it out, and set "
                f"model_revision={given[key]}"
            )
    return {"revision": commit, "tokenizer_revision": commit if own_tokenizer else given.get("tokenizer_revision") or "main"}


def _check_chat_template(config: GenerateConfig, commit: str | None) -> None:
    from transformers import AutoTokenizer

    if {"tokenizer", "tokenizer_mode"} & set(config.engine.engine_kwargs):
        # vLLM knows, and says so row by row.
        return
    trust = config.engine.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(config.model, revision=commit or "main", trust_remote_code=trust)
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(f"{config.model} has no chat template, which messages_column needs: use prompt_column or template")


@dataclass(frozen=True)
class UsedArtifact:
    """The artifact that a job re-routes by."""

    content: bytes = b""
    """Empty where none is used."""
    version: str = ""
    """Where it came from: a path, or models:/NAME/VERSION also where the settings name an alias, which moves."""

    @property
    def facts(self) -> dict[str, str]:
        """What a run records of it."""
        if not self.content:
            return {}
        return {"similarity_version": self.version, "similarity_digest": hashlib.sha256(self.content).hexdigest()}


def prepare_reroute(config: GenerateConfig, facts: ModelFacts, scratch: Path) -> tuple[RerouteConfig | None, UsedArtifact]:
    """The re-routing settings with a local artifact, and that artifact.

    Raises:
        ConfigError, SimilarityError: as every engine would at its start.
    """
    if config.reroute is None:
        return None, UsedArtifact()
    reroute, path, version = config.reroute.resolved(), None, ""
    if replaced := config.reroute.replaced_by_file:
        shown = ", ".join(f"{key}={value}" for key, value in replaced.items())
        _log.warning("policy_file %s stands in the place of %s", config.reroute.policy_file, shown)
    if reroute.needs_tables:
        assert reroute.similarity is not None
        version = resolve_version(reroute.similarity, uri=config.tracking.uri)
        path = resolve_artifact(version, tracking_uri=config.tracking.uri, folder=scratch)
        reroute = dataclasses.replace(reroute, similarity=str(path.absolute()))
    _check_reroute(reroute, facts)
    return reroute, UsedArtifact(read_similarity(path), version)


def check_stats_dir(reroute: RerouteConfig | None, storage: Storage) -> None:
    """Refuse a folder with an earlier run's counters, which would be added to this run's."""
    if reroute is None or reroute.stats_dir is None or storage.get(JOB_FILE) is not None:
        return
    if any(Path(reroute.stats_dir).glob("*")):
        raise ConfigError(f"stats_dir {reroute.stats_dir} holds an earlier run's counters: name a new or empty folder")


def _check_reroute(config: RerouteConfig, facts: ModelFacts) -> None:
    for layer in (None, *config.per_layer):
        if layer is not None and facts.num_layers is not None and layer >= facts.num_layers:
            raise ConfigError(f"per_layer.{layer} names no layer: the model has {facts.num_layers} layers, from 0 on")
        votes, where = config.rules(layer).votes, "" if layer is None else f"per_layer.{layer}: "
        most = max(top_k for _, top_k in votes.steps()) if votes.rule == "top" else 1
        if facts.top_k is not None and most > facts.top_k:
            raise ConfigError(f"{where}primary_top_k must be between 1 and the model's top_k ({facts.top_k}), got {most:g}")
        if votes.rule == "budget" and facts.experts_per_layer is not None and votes.budget > facts.experts_per_layer:
            raise ConfigError(
                f"{where}votes.budget must be at most the model's experts ({facts.experts_per_layer}), got {votes.budget}"
            )
    every = [config.rules(layer) for layer in (None, *config.per_layer)]
    if facts.top_k is not None and config.policy != "none" and not any(r.changes_routing(facts.top_k) for r in every):
        _log.warning("these settings of reroute change no routing: every row keeps all its %d experts", facts.top_k)
    if config.needs_tables:
        from sere.ops.policies.requirements import check_artifact
        from sere.ops.similarity import SimilarityArtifact

        assert config.similarity is not None
        artifact = SimilarityArtifact.load(config.similarity)
        model = facts.identity if config.check_model else None
        # Replicas, whose nodes have the files in any case, ask what only files can tell.
        artifact.check_model(num_experts=artifact.num_experts, model=model, files_to_come=True)
        check_artifact(config, artifact)


def engine_arguments(config: GenerateConfig, reroute: RerouteConfig | None, *, on_gpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's engine. Of a hub model `config.model_revision` is a commit here."""
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
    arguments["distributed_executor_backend"] = several if num_devices(config) > 1 else "uni"
    if engine.max_model_len is not None:
        arguments["max_model_len"] = engine.max_model_len
    if engine.lora_adapters:
        arguments |= {"enable_lora": True, "max_loras": len(engine.lora_adapters), "max_lora_rank": engine.max_lora_rank}
    if not on_gpu:
        arguments["kv_cache_memory_bytes"] = int(engine.kv_cache_gib * 2**30)
    arguments |= {**engine.engine_kwargs, **_revisions(config, config.model_revision)}
    if reroute is not None:
        arguments["additional_config"] = {**arguments.get("additional_config", {}), "sere": reroute.to_dict()}
    return arguments


def join_cluster(config: GenerateConfig, address: str | None) -> bool:
    """Join or start a Ray cluster; returns whether its replicas run on GPUs.

    Raises:
        ConfigError: if the replicas the job needs do not fit a machine of its own, which cannot grow.
    """
    import ray

    engine = config.engine
    # Reading and writing take a core beside the replicas.
    start_ray((engine.max_replicas or engine.num_replicas) * engine.cpus_per_replica + 1, address=address)
    resources = ray.cluster_resources()
    # Asked for by name GPUs are waited for: a cluster may have none yet.
    on_gpu = bool(engine.gpus_per_replica) or (resources.get("GPU", 0) > 0 and gpus_per_replica(config) > 0)
    needs = {"CPU": engine.num_replicas * engine.cpus_per_replica + 1}
    if on_gpu:
        needs["GPU"] = engine.num_replicas * gpus_per_replica(config)
    what = f"a job of {engine.num_replicas} replicas, which reads and writes on one more core,"
    remedy = "engine.num_replicas or engine.{}_per_replica"
    refuse_missing_room(needs, address=address, what=what, remedy=remedy)
    return on_gpu
