"""Reading a similarity artifact wherever it is kept."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sere.pipeline.tracking.registry import resolve_artifact

if TYPE_CHECKING:
    from sere.ops.similarity import SimilarityArtifact


def load_artifact(path_or_uri: str, *, uri: str | None) -> "SimilarityArtifact":
    """An artifact given by path, `models:/NAME/VERSION` or `models:/NAME@ALIAS`.

    Args:
        path_or_uri: Where it is.
        uri: MLflow tracking URI, for what the registry keeps.

    Raises:
        ConfigError: if there is none, or it is damaged.
    """
    from sere.ops.similarity import SimilarityArtifact

    with tempfile.TemporaryDirectory(prefix="sere-artifact-") as folder:
        return SimilarityArtifact.load(resolve_artifact(path_or_uri, tracking_uri=uri, folder=Path(folder)))
