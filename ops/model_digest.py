"""`model_digest`: which weights a model has, cheaply. Ties a similarity artifact to the model it was computed from."""

import hashlib
import os
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


def model_digest(model: str | os.PathLike[str]) -> str | None:
    """SHA-256 over the safetensors files' names, sizes and samples of their bytes; None where there are none.

    Samples (2 MiB a file, its header among them) rather than all bytes: a 60 GB model is told apart from a fine-tuned copy
    in under a second.
    """
    folder = resolve_model_folder(model)
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            for sample in range(_SAMPLES):
                opened.seek(sample * size // _SAMPLES)
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()
