"""Reading a model's configuration, with errors that a user can act on."""

from typing import Any

from conf.schema import ConfigError


def read_model_config(model: str, *, trust_remote_code: bool) -> Any:
    """The Transformers configuration of a model given by folder or hub name.

    Raises:
        ConfigError: if there is no such model.
    """
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {model} cannot be read ({str(error).splitlines()[0]}): give a model folder or a hub name"
        ) from error


def make_empty_model(model_config: Any, *, trust_remote_code: bool) -> Any:
    """The model's modules without weights (on torch's meta device): shows its structure in no memory."""
    import torch
    import transformers

    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
