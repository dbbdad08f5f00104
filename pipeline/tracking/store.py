"""An MLflow store: opening it, and the error of one that fails."""

import logging
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from sere.conf.errors import ConfigError, TryAgainError
from sere.conf.masking import mask_uri
from sere.conf.schema import TrackingConfig
from sere.pipeline.runtime import storage

_PORTS = {"http": 80, "https": 443}
_SQLITE = "sqlite:///"


def quiet() -> None:
    """Have MLflow say only what matters, and give up on a server within a minute. Before MLflow is imported."""
    # Git is looked up for a tag of the run; a missing one is no reason for a warning.
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    # Each wait is twice as long as the one before it: 2, 4, 8 and 16 seconds.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
    # The lines about where to view a run have the address as it was given, with its password.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # Otherwise every new SQLite file announces its tables, and system metrics say that they begin and end.
    for name in ("mlflow.store.db.utils", "mlflow.system_metrics.system_metrics_monitor"):
        logging.getLogger(name).setLevel(logging.WARNING)


def read_store(uri: str) -> None:
    """Point MLflow to a store that is there already.

    Raises:
        ConfigError: if it is not, or cannot be opened.
    """
    if uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE)).is_file():
        raise ConfigError(f"no MLflow store at {mask_uri(uri)}: give the tracking.uri of the runs with --uri")
    use_store(uri)


def use_store(uri: str, *, has_worked: bool = False) -> None:
    """Point MLflow to a store; an SQLite file and its folder are made.

    Args:
        uri: Of the store.
        has_worked: See `unusable`.

    Raises:
        ConfigError: if the store cannot be opened.
    """
    quiet()
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        if uri.startswith(_SQLITE):
            Path(uri.removeprefix(_SQLITE)).absolute().parent.mkdir(parents=True, exist_ok=True)
        elif uri.startswith(("http://", "https://")):
            # MLflow itself retries for minutes without a word.
            address = urlsplit(uri)
            socket.create_connection((address.hostname, address.port or _PORTS[address.scheme]), timeout=10).close()
        mlflow.set_tracking_uri(uri)
        mlflow.MlflowClient()
    except (OSError, ValueError, MlflowException) as error:
        raise unusable(uri, error, has_worked=has_worked) from error


def first_line(error: Exception) -> str:
    """Of an error's text, without secrets."""
    return mask_uri(storage.first_line(error))


def unusable(uri: str, error: Exception, *, has_worked: bool = False) -> ConfigError:
    """The error of a store that does not do what it is asked.

    Args:
        uri: Of the store.
        error: What it, or the network, said.
        has_worked: This job has used it before: unless it refuses what it is asked, it may work again.
    """
    from mlflow.exceptions import MlflowException

    what = f"MLflow store {mask_uri(uri)!r} cannot be used ({first_line(error)})"
    refuses = isinstance(error, ValueError) or (isinstance(error, MlflowException) and error.get_http_status_code() < 500)
    if has_worked and not refuses:
        return TryAgainError(f"{what}: run the same command again when it answers; what is finished is kept")
    return ConfigError(f"{what}: check tracking.uri")


def use_experiment(config: TrackingConfig) -> str:
    """Make the experiment if needed and return its id. With SQLite, artifacts go beside the database file."""
    import mlflow
    from mlflow.exceptions import MlflowException

    assert config.uri is not None
    use_store(config.uri)
    try:
        experiment = mlflow.get_experiment_by_name(config.experiment)
        if experiment is None:
            location = None
            if config.uri.startswith(_SQLITE):
                location = (Path(config.uri.removeprefix(_SQLITE)).absolute().parent / "mlartifacts").as_uri()
            mlflow.create_experiment(config.experiment, artifact_location=location)
        return mlflow.set_experiment(config.experiment).experiment_id
    except MlflowException as error:
        raise unusable(config.uri, error) from error
