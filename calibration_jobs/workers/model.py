"""Reading and loading models, with errors that a user can act on."""

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sere.calibration_jobs.capture.batches import block_tokens_of
from sere.calibration_jobs.capture.experts import find_expert_modules
from sere.calibration_jobs.metrics.weights import check_weights
from sere.conf.errors import ConfigError
from sere.conf.schema import CalibrateConfig
from sere.pipeline.runtime.model_facts import ModelFacts, read_model_facts


def make_empty_model(facts: ModelFacts, *, trust_remote_code: bool) -> Any:
    """The model's modules without weights (on torch's meta device): shows its structure in no memory."""
    import transformers

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    code = (getattr(facts.config, "auto_map", None) or {}).get("AutoModelForCausalLM", "")
    if trust_remote_code and facts.commit is not None and code and "--" not in code:
        # Transformers would take the code of the main branch. Code of another repository is REPOSITORY--MODULE.CLASS.
        options["code_revision"] = facts.commit
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(facts.config, **options)


@dataclass(frozen=True, kw_only=True)
class MoeFacts(ModelFacts):
    """What calibration knows of a model before it is loaded; `inspect_model` fills it."""

    num_experts: int
    """Of every MoE layer."""
    layers: tuple[int, ...]
    """Those with experts."""
    hidden_size: int
    """Of the layers' inputs and outputs."""
    block_tokens: int
    """Tokens of a block, as `block_tokens_of` fits them into memory."""


def inspect_model(config: CalibrateConfig) -> MoeFacts:
    """Refuse a model that cannot be calibrated, before any work."""
    trust = config.trust_remote_code
    facts = read_model_facts(config.model, revision=config.model_revision, trust_remote_code=trust)
    experts = find_expert_modules(make_empty_model(facts, trust_remote_code=trust))
    counts = {module.num_experts for module in experts.values()}
    if len(counts) > 1:
        raise ConfigError(f"{config.model} has layers of {sorted(counts)} experts: such models are not supported")
    if "weights" in config.metrics:
        for module in experts.values():
            check_weights(module)
    context = facts.context_length
    if context is not None and config.sequence_length > context:
        raise ConfigError(f"sequence_length must be at most the model's context, {context}, got {config.sequence_length}")
    (num_experts,) = counts
    hidden_size = facts.config.get_text_config().hidden_size
    block_tokens = block_tokens_of(config, num_experts=num_experts, hidden_size=hidden_size)
    return MoeFacts(
        **vars(facts),
        num_experts=num_experts,
        layers=tuple(sorted(experts)),
        hidden_size=hidden_size,
        block_tokens=block_tokens,
    )


def load_tokenizer(config: CalibrateConfig) -> Any:
    """The model's tokenizer.

    Raises:
        ConfigError: if the model has none.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            config.model, revision=config.model_revision or "main", trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"the tokenizer of {config.model} cannot be read ({str(error).splitlines()[0]})") from error


def load_model(config: CalibrateConfig, offload_folder: str | Path) -> nn.Module:
    """The model in evaluation mode, on this worker's GPUs or on the CPU.

    With `max_memory_gib`, as many layers as fit stay in memory; the others are read from disk each time they are used.

    Args:
        config: The settings.
        offload_folder: Where weights are written that cannot be read from the checkpoint as they are.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    placement: dict[str, Any] = {}
    num_gpus = math.ceil(config.num_gpus_per_worker)
    if config.max_memory_gib is not None:
        limit = int(config.max_memory_gib * 2**30)
        # Accelerate takes 0 for "no such device", as it does a missing key; GPUs share the limit.
        memory = {gpu: limit // num_gpus for gpu in range(num_gpus)} | ({} if num_gpus else {"cpu": limit})
        placement = {"device_map": "auto", "max_memory": memory, "offload_folder": str(offload_folder)}
    elif num_gpus:
        placement = {"device_map": "auto"}
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            config.model,
            revision=config.model_revision or "main",
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            **placement,
        )
    except OSError as error:
        raise ConfigError(f"the weights of {config.model} cannot be read ({str(error).splitlines()[0]})") from error
    # On the CPU the eager path is about 40 times slower.
    model.set_experts_implementation("grouped_mm")
    if config.max_memory_gib is not None:
        _give_back_freed_memory(model)
    return model.eval()


def _give_back_freed_memory(model: nn.Module) -> None:
    """After each MoE layer return to the system what its offloaded weights took: glibc keeps freed blocks of unlike sizes,
    and the process would grow to the size of the model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries have none
        for module in find_expert_modules(model).values():
            module.register_forward_hook(lambda *_: (trim(0), None)[1])
