"""The model registry of an MLflow store: versions of similarity artifacts, and their aliases."""

import re
from pathlib import Path

from sere.conf.errors import ConfigError
from sere.conf.masking import mask_uri
from sere.pipeline.tracking.store import first_line, read_store, unusable, use_store

REGISTRY_SCHEME = "models:/"
CANDIDATE, CHAMPION = "candidate", "champion"
"""Aliases: the newest version, and the one that was chosen."""


def alias_version(uri: str, name: str, alias: str, *, not_from: str | None = None) -> str | None:
    """The version that an alias of a registered model points to; None if there is none, or run `not_from` made it."""
    use_store(uri)
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        found = mlflow.MlflowClient().get_model_version_by_alias(name, alias)
        return None if not_from is not None and found.run_id == not_from else str(found.version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise unusable(uri, error) from error


def resolve_version(path_or_uri: str, *, uri: str | None) -> str:
    """`models:/NAME/VERSION` for `models:/NAME@ALIAS`, whatever else as it is: to be asked once, as aliases move.

    Raises:
        ConfigError: if there is no such store or alias.
    """
    match = re.fullmatch(rf"{REGISTRY_SCHEME}([^/@]+)@([^/@]+)", path_or_uri)
    if match is None:
        return path_or_uri
    if not uri:
        raise ConfigError(f"{path_or_uri} needs an MLflow store: set tracking.uri, or give a path")
    read_store(uri)
    version = alias_version(uri, *match.groups())
    if version is None:
        raise ConfigError(
            f"{path_or_uri} cannot be read from {mask_uri(uri)} (no such alias): run `sere calibrate` with this tracking.uri, "
            "or give a path"
        )
    return f"{REGISTRY_SCHEME}{match[1]}/{version}"


def promote(version_uri: str, *, uri: str) -> tuple[str, str, str | None]:
    """Move alias champion to a version given as `models:/NAME/VERSION` or `models:/NAME@ALIAS`.

    Returns:
        The model's name, the version, and the champion before (None: there was none).

    Raises:
        ConfigError: if the form is wrong, or there is no such store or version.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))", version_uri)
    if match is None:
        raise ConfigError(f"{version_uri!r} must be models:/NAME/VERSION or models:/NAME@ALIAS")
    name, number, alias = match.groups()
    read_store(uri)
    version = number or alias_version(uri, name, alias)
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient()
    try:
        if version is None:
            raise MlflowException(f"there is no alias {alias!r}")
        client.get_model_version(name, version)
        before = alias_version(uri, name, CHAMPION)
        client.set_registered_model_alias(name, CHAMPION, version)
    except MlflowException as error:
        raise ConfigError(
            f"{version_uri} cannot be promoted in {mask_uri(uri)} ({first_line(error)}): look at the versions in the MLflow "
            "UI, or give the tracking.uri of the calibration with --uri"
        ) from error
    return name, version, before


def resolve_artifact(path_or_uri: str, *, tracking_uri: str | None, folder: Path) -> Path:
    """The local path of an artifact given by path, or downloaded from the registry (`models:/NAME@ALIAS` or `/VERSION`).

    Raises:
        ConfigError: if the registry has no such version, or there is no registry.
    """
    if not path_or_uri.startswith(REGISTRY_SCHEME):
        return Path(path_or_uri)
    if not tracking_uri:
        raise ConfigError(f"{path_or_uri} needs an MLflow store: set tracking.uri, or give a path")
    read_store(tracking_uri)
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=path_or_uri, dst_path=str(folder)))
    except MlflowException as error:
        raise ConfigError(
            f"{path_or_uri} cannot be read from {mask_uri(tracking_uri)} ({first_line(error)}): run `sere calibrate` with this "
            "tracking.uri, or give a path"
        ) from error
