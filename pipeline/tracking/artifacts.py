"""Reading a similarity artifact wherever it is kept."""

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sere.conf.errors import ConfigError
from sere.pipeline.tracking.registry import resolve_artifact

if TYPE_CHECKING:
    from sere.ops.similarity import SimilarityArtifact


def load_artifact(path_or_uri: str, *, uri: str | None, digest: str | None = None) -> "SimilarityArtifact":
    """An artifact given by path, `models:/NAME/VERSION` or `models:/NAME@ALIAS`.

    Args:
        path_or_uri: Where it is.
        uri: MLflow tracking URI, for what the registry keeps.
        digest: SHA-256 that the file must have; None: any.

    Raises:
        ConfigError: if there is none, it is damaged, or it has another digest.
    """
    from sere.ops.similarity import FILE_NAME, SimilarityArtifact

    with tempfile.TemporaryDirectory(prefix="sere-artifact-") as folder:
        path = resolve_artifact(path_or_uri, tracking_uri=uri, folder=Path(folder))
        artifact = SimilarityArtifact.load(path)
        file = path / FILE_NAME if path.is_dir() else path
        if digest is not None and hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise ConfigError(f"{path_or_uri} is another artifact by now than the run used (digest {digest[:8]})")
        return artifact
