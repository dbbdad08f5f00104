"""An MLflow store: opening it, and what is in it: runs, their metrics and files, versions and aliases."""

import logging
import os
import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sere.conf.errors import ConfigError
from sere.conf.masking import mask_uri
from sere.conf.schema import TrackingConfig

REGISTRY_SCHEME = "models:/"
CANDIDATE, CHAMPION = "candidate", "champion"
"""Aliases: the newest version, and the one that was chosen."""
_PORTS = {"http": 80, "https": 443}


def quiet() -> None:
    """Have MLflow say only what matters, and give up on a server within a minute. Before MLflow is imported."""
    # Git is looked up for a tag of the run; a missing one is no reason for a warning.
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    # Each wait is twice as long as the one before it: 2, 4, 8 and 16 seconds.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
    # Otherwise every new SQLite file announces its tables, and system metrics say that they begin and end.
    for name in ("mlflow.store.db.utils", "mlflow.system_metrics.system_metrics_monitor"):
        logging.getLogger(name).setLevel(logging.WARNING)


def use_store(uri: str) -> None:
    """Point MLflow to a store; an SQLite file's folder is made.

    Raises:
        ConfigError: if the store cannot be opened.
    """
    quiet()
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).absolute().parent.mkdir(parents=True, exist_ok=True)
        elif uri.startswith(("http://", "https://")):
            # MLflow itself retries for minutes without a word.
            address = urlsplit(uri)
            socket.create_connection((address.hostname, address.port or _PORTS[address.scheme]), timeout=10).close()
        mlflow.set_tracking_uri(uri)
        mlflow.MlflowClient()
    except (OSError, ValueError, MlflowException) as error:
        raise unusable(uri, error) from error


def first_line(error: Exception) -> str:
    """Of an error's text, without secrets."""
    return mask_uri((str(error).strip() or type(error).__name__).splitlines()[0])


def unusable(uri: str, error: Exception) -> ConfigError:
    """The error of a store that does not do what it is asked."""
    return ConfigError(f"MLflow store {mask_uri(uri)!r} cannot be used ({first_line(error)}): check tracking.uri")


def use_experiment(config: TrackingConfig) -> str:
    """Make the experiment if needed and return its id. With SQLite, artifacts go beside the database file."""
    import mlflow
    from mlflow.exceptions import MlflowException

    use_store(config.uri)
    try:
        experiment = mlflow.get_experiment_by_name(config.experiment)
        if experiment is None:
            location = None
            if config.uri.startswith("sqlite:///"):
                location = (Path(config.uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()
            mlflow.create_experiment(config.experiment, artifact_location=location)
        return mlflow.set_experiment(config.experiment).experiment_id
    except MlflowException as error:
        raise unusable(config.uri, error) from error


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


def promote(version_uri: str, *, uri: str) -> tuple[str, str, str | None]:
    """Move alias champion to a version given as `models:/NAME/VERSION` or `models:/NAME@ALIAS`.

    Returns:
        The model's name, the version, and the champion before (None: there was none).

    Raises:
        ConfigError: if the form is wrong or there is no such version.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))", version_uri)
    if match is None:
        raise ConfigError(f"{version_uri!r} must be models:/NAME/VERSION or models:/NAME@ALIAS")
    name, number, alias = match.groups()
    version = number or alias_version(uri, name, alias)
    use_store(uri)
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
    use_store(tracking_uri)
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=path_or_uri, dst_path=str(folder)))
    except MlflowException as error:
        raise ConfigError(
            f"{path_or_uri} cannot be read from {mask_uri(tracking_uri)} ({first_line(error)}): run `sere calibrate` with this "
            "tracking.uri, or give a path"
        ) from error


def read_runs(uri: str, experiment: str) -> list[dict[str, Any]]:
    """The finished generate runs of an experiment, oldest first.

    Returns:
        Of each: `run_id`, `name`, `params`, `metrics`, `started_ms` (since 1970), `commit`, and `data_digest` ("" if unknown).

    Raises:
        ConfigError: if there is no such experiment.
    """
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise ConfigError(f"no MLflow store at {mask_uri(uri)}: give the tracking.uri of the runs with --uri")
    use_store(uri)
    import mlflow

    found = mlflow.get_experiment_by_name(experiment)
    if found is None:
        names = ", ".join(e.name for e in mlflow.search_experiments()) or "none"
        raise ConfigError(f"no experiment {experiment!r} in {mask_uri(uri)} (there: {names}): name one, or set --uri")
    runs = mlflow.search_runs(
        [found.experiment_id],
        filter_string="attributes.status = 'FINISHED' and tags.`sere.kind` = 'generate'",
        order_by=["attributes.start_time ASC"],
        output_format="list",
    )
    return [
        {
            "run_id": r.info.run_id,
            "name": r.info.run_name,
            "params": r.data.params,
            "metrics": r.data.metrics,
            "started_ms": r.info.start_time,
            "commit": r.data.tags.get("sere.commit", "unknown"),
            # A run that went on after an interruption may name its data twice.
            "data_digest": " ".join(sorted({i.dataset.digest for i in r.inputs.dataset_inputs})),
        }
        for r in runs
    ]


def read_history(uri: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    """All values of a run's metric by step, in order; the last one where a step has several. Empty if there is none."""
    use_store(uri)
    import mlflow

    values = mlflow.MlflowClient().get_metric_history(run_id, metric)
    return sorted({v.step: v.value for v in sorted(values, key=lambda v: v.timestamp)}.items())


def download_file(uri: str, run_id: str, path: str, *, folder: Path) -> Path | None:
    """Download a file among a run's artifacts into `folder`; None if the run has none of that path.

    Raises:
        ConfigError: if the store of the artifacts cannot be read.
    """
    use_store(uri)
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        parent = path.rpartition("/")[0] or None
        if path not in {item.path for item in mlflow.MlflowClient().list_artifacts(run_id, parent)}:
            return None
        return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=path, dst_path=str(folder)))
    # Stores in a cloud need packages and credentials of their own; each fails in its way.
    except (OSError, ImportError, MlflowException) as error:
        raise ConfigError(
            f"{path} of run {run_id} cannot be read ({first_line(error)}): check access to the artifact store"
        ) from error
