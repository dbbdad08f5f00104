"""Cheap fingerprints of large files: which weights a model has, which files a dataset is."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

_SAMPLES = 32
_SAMPLE_BYTES = 65536


def resolve_model_folder(model: str | os.PathLike[str]) -> Path | None:
    """The local folder of a model given by folder or by hub name (if its snapshot is in the local cache), else None."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        return None


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


def model_digest(model: str | os.PathLike[str]) -> str | None:
    """`files_digest` of a model's safetensors files; None where there are none. Ties an artifact to its model."""
    folder = resolve_model_folder(model)
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    return files_digest(files) if files else None
