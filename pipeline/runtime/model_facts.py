"""What is known of a model from its configuration files, without loading it."""

import os
from dataclasses import dataclass
from typing import Any

from sere.conf.errors import ConfigError

# What model families call the number of experts a token is sent to.
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")
# And the number of experts of a layer.
_NUM_EXPERTS_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model's facts. None stands for what its configuration does not say."""

    name: str
    """Folder or hub name."""
    digest: str | None
    """Of its weights (`sere.ops.model_digest`); None where there are no safetensors files here."""
    top_k: int | None
    """Experts a token is sent to."""
    experts_per_layer: int | None
    """Experts of a layer that tokens are sent to."""
    num_layers: int | None
    """Layers, with and without experts."""
    context_length: int | None
    """Most tokens of a sequence."""
    config: Any
    """The Transformers configuration."""


def read_model_facts(model: str, *, trust_remote_code: bool) -> ModelFacts:
    """Read the facts of a model given by folder or hub name.

    Raises:
        ConfigError: if there is no such model.
    """
    import transformers

    from sere.ops.model_digest import model_digest

    try:
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {model} cannot be read ({str(error).splitlines()[0]}): give a model folder or a hub name"
        ) from error
    text = config.get_text_config()
    return ModelFacts(
        name=os.fspath(model),
        digest=model_digest(model),
        top_k=next((getattr(text, name) for name in _TOP_K_NAMES if getattr(text, name, None)), None),
        experts_per_layer=next((getattr(text, name) for name in _NUM_EXPERTS_NAMES if getattr(text, name, None)), None),
        num_layers=getattr(text, "num_hidden_layers", None),
        context_length=getattr(text, "max_position_embeddings", None),
        config=config,
    )
