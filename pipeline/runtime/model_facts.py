"""What is known of a model without loading it: which one it is, and what its configuration files say."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere.conf.errors import ConfigError
from sere.ops.model_digest import WEIGHT_FILES, ModelIdentity, cached_commit, model_digest
from sere.pipeline.runtime.storage import first_line

# What model families call the number of experts a token is sent to.
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")
# And the number of experts of a layer.
_NUM_EXPERTS_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

CHOOSE_COMMIT = "go on with a hub model's commit by model_revision=COMMIT"
"""What helps a job whose model's branch has moved since it was begun."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model's facts. None stands for what its configuration does not say."""

    name: str
    """Folder or hub name."""
    revision: str | None
    """Branch, tag or commit that was asked for; None: the main branch, or a folder."""
    commit: str | None
    """What that was when it was asked for; None for a folder."""
    digest: str | None
    """Of its weights (`sere.ops.model_digest`); None where a hub model's are not, or not all, on this machine."""
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

    @property
    def identity(self) -> ModelIdentity:
        """What an artifact's model is compared with."""
        return ModelIdentity(digest=self.digest, commit=self.commit)

    @property
    def job_digest(self) -> str:
        """What a job is of: a hub model's commit, which is known before its files are here, or the digest of a folder's."""
        return f"commit:{self.commit}" if self.commit is not None else str(self.digest)

    @property
    def earlier_digests(self) -> tuple[str | None, ...]:
        """What a job of this model has in the place of `job_digest` if it was begun before there were commits.

        That was the digest of the safetensors files, or None where there were none yet; and always of the main branch.
        """
        if self.commit is None:
            return () if any(Path(self.name).glob(WEIGHT_FILES[0])) else (None,)
        known = () if self.digest is None else (self.digest,)
        return (*known, None) if self.revision is None else known


def read_model_facts(model: str, *, revision: str | None, trust_remote_code: bool) -> ModelFacts:
    """Read the facts of a model.

    Args:
        model: Folder or hub name.
        revision: Branch, tag or commit of a hub model; None: its main branch.
        trust_remote_code: Run code that comes with it.

    Raises:
        ConfigError: if there is no such model or revision, or a folder has no weights.
    """
    import transformers

    is_folder = Path(model).is_dir()
    if is_folder and revision is not None:
        raise ConfigError(f"model {model} is a folder, which has no revisions: leave out model_revision={revision}")
    commit = None if is_folder else _resolve(model, revision)
    try:
        config = transformers.AutoConfig.from_pretrained(model, revision=commit or "main", trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _unreadable(model, error) from error
    digest = model_digest(model, commit)
    if is_folder and digest is None:
        *most, last = WEIGHT_FILES
        raise ConfigError(
            f"model {model} has no weights ({', '.join(most)} or {last} files), so which model it is cannot be known: "
            "complete the folder, or give a hub name"
        )
    text = config.get_text_config()
    return ModelFacts(
        name=os.fspath(model),
        revision=revision,
        commit=commit,
        digest=digest,
        top_k=next((getattr(text, name) for name in _TOP_K_NAMES if getattr(text, name, None)), None),
        experts_per_layer=next((getattr(text, name) for name in _NUM_EXPERTS_NAMES if getattr(text, name, None)), None),
        num_layers=getattr(text, "num_hidden_layers", None),
        context_length=getattr(text, "max_position_embeddings", None),
        config=config,
    )


def _resolve(model: str, revision: str | None) -> str:
    """The commit of a hub model's revision, asked for once: whoever loads the model later is told the commit.

    Raises:
        ConfigError: if there is no such model or revision, neither on the hub nor in the local cache.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return HfApi().resolve_revision(model, revision=revision).resolved
    except RevisionNotFoundError as error:
        raise ConfigError(
            f"model {model} has no revision {revision or 'main'!r}: give a branch, tag or commit of it as model_revision"
        ) from error
    except Exception as error:
        # The hub, its client and what carries requests have errors of their own. A model that may not be asked for any more
        # can still be here.
        commit = cached_commit(model, revision)
        if commit is None:
            raise _unreadable(model, error) from error
        return commit


def _unreadable(model: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"model {model} cannot be read ({type(error).__name__}: {first_line(error)}): give a model folder, or a hub name "
        "and, as model_revision, a branch, tag or commit that is there"
    )
