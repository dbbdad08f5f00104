"""`sere artifact promote`: which version is the champion."""

from typing import TYPE_CHECKING

from sere.pipeline.tracking import registry

if TYPE_CHECKING:
    from rich.console import Console


def promote(version_uri: str, *, uri: str, console: "Console") -> None:
    """Make a version the champion of its registered model.

    Args:
        version_uri: `models:/NAME/VERSION` or `models:/NAME@ALIAS`.
        uri: MLflow tracking URI.
        console: Where to say what was done.

    Raises:
        ConfigError: if there is no such version.
    """
    name, version, before = registry.promote(version_uri, uri=uri)
    console.print(f"{name}: champion is version {version}, was {before or 'none'}", highlight=False, markup=False)
