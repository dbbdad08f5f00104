"""Which weights a model has: the commit of a hub model, and cheap fingerprints of large files. Asks no hub."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_SAMPLES = 32
_SAMPLE_BYTES = 65536
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")
"""Kinds of weights' files; the first kind that a model has is the one that is loaded."""
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """What tells a model's weights from others'. None stands for what is not known."""

    digest: str | None = None
    """Of the weights' files."""
    commit: str | None = None
    """Of a model of the hub."""

    def is_same(self, other: "ModelIdentity") -> bool | None:
        """Whether the weights are the same; None where nothing is known of both. One commit has one set of files; two may
        have the same, if it is the model's card that changed."""
        if self.commit is not None and self.commit == other.commit:
            return True
        for mine, others in ((self.digest, other.digest), (self.commit, other.commit)):
            if mine is not None and others is not None:
                return mine == others
        return None

    def __str__(self) -> str:
        known = {"commit": self.commit, "digest": self.digest and self.digest[:12]}
        return ", ".join(f"{name} {value}" for name, value in known.items() if value) or "neither commit nor digest known"


def model_identity(model: str | os.PathLike[str], revision: str | None = None) -> ModelIdentity:
    """What this machine knows of a model.

    Args:
        model: Folder or hub name.
        revision: Branch, tag or commit of a hub model, or a `ResolvedRevision` as vLLM has it; None: its main branch.
    """
    if Path(model).is_dir():
        # Where there is no hub vLLM puts the snapshot's folder, which has the commit's name, in the hub name's place.
        commit = revision if revision is not None and Path(model).name == revision else None
        return ModelIdentity(digest=model_digest(model), commit=commit)
    commit = cached_commit(model, revision)
    return ModelIdentity(digest=model_digest(model, commit) if commit is not None else None, commit=commit)


def cached_commit(model: str | os.PathLike[str], revision: str | None = None) -> str | None:
    """The commit that a hub model's revision was when it was last asked for; None if it never was. A commit is itself."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionResolutionError

    try:
        return HfApi().resolve_revision(str(model), revision=revision, local_files_only=True).resolved
    except (RevisionResolutionError, OSError, ValueError):
        return None


def resolve_model_folder(model: str | os.PathLike[str], revision: str | None = None) -> Path | None:
    """The local folder of a model given by folder or by hub name (if its snapshot is in the local cache), else None."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # Of the other files some are never downloaded, and without them the snapshot would count as incomplete.
        found = snapshot_download(str(model), revision=revision, local_files_only=True, allow_patterns=["config.json"])
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        return None
    return Path(found)


def files_digest(files: Iterable[Path]) -> str:
    """SHA-256 over the files' names, sizes and samples of their bytes (2 MiB a file, its beginning among them).

    Samples rather than all bytes: a 60 GB model is told apart from a fine-tuned copy in under a second.
    """
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            for sample in range(_SAMPLES):
                opened.seek(sample * size // _SAMPLES)
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def model_digest(model: str | os.PathLike[str], revision: str | None = None) -> str | None:
    """`files_digest` of a model's weights; None where there are none, or not all of a hub model's yet. Ties an artifact to
    its model."""
    folder = resolve_model_folder(model, revision)
    if folder is None:
        return None
    files = next((found for kind in WEIGHT_FILES if (found := sorted(folder.glob(kind)))), [])
    if not files or (not Path(model).is_dir() and _lacks_files(folder)):
        return None
    return files_digest(files)


def _lacks_files(snapshot: Path) -> bool:
    """Whether a download is under way, or was interrupted: files come one by one, each whole."""
    indices = [json.loads((snapshot / name).read_text()) for name in _INDICES if (snapshot / name).is_file()]
    return any(not (snapshot / name).is_file() for index in indices for name in set(index["weight_map"].values()))
