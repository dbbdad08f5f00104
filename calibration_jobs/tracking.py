"""Runs, metrics, pictures, model versions and aliases: the only user of MLflow. `track` with an empty URI records nothing."""

import dataclasses
import hashlib
import json
import logging
import os
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from conf.masking import mask_uri, mask_values
from conf.schema import ConfigError, TrackingConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PORTS = {"http": 80, "https": 443}
REGISTRY_SCHEME = "models:/"
CANDIDATE, CHAMPION = "candidate", "champion"
"""Aliases: the newest version, and the one that was chosen."""
_MAX_METRIC_NAME = 250
_MAX_PARAM_LENGTH = 500


def _metric_name(name: str) -> str:
    """A name that MLflow takes: those of domains and tasks come from the data, and may be anything."""
    parts = re.sub(r"[^\w\-. :/]", "_", name)[:_MAX_METRIC_NAME].split("/")
    return "/".join(part if part.strip(". ") else "_" for part in parts)


class NullTracker:
    """Records nothing; the interface of every tracker."""

    run_id: str | None = None

    def log_config(self, config: Any) -> None:
        """Record a resolved config (a dataclass): its leaves as params, and all of it as config.json."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record values known at the start."""

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Record numbers."""

    def log_figure(self, figure: "Figure", path: str) -> None:
        """Record a picture under `path` among the run's artifacts."""

    def log_dataset(self, *, source: str, digest: str, num_rows: int, context: str) -> None:
        """Record a dataset as an input of the run."""

    def log_file(self, file: Path) -> None:
        """Record a file among the run's artifacts."""

    def log_values(self, values: Mapping[str, Any], path: str) -> None:
        """Record values as a JSON file under `path` among the run's artifacts."""

    def register_artifact(self, file: Path, *, name: str, alias: str, tags: Mapping[str, str]) -> str | None:
        """Store a file as a new version of registered model `name`, give it `alias`, and return its version.

        Done once: a run that has registered the very file, and was interrupted after that, gets the same version again.
        """
        return None

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Move an alias of a registered model to a version."""


class MlflowTracker(NullTracker):
    """Records to the active MLflow run."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id

    def log_config(self, config: Any) -> None:
        import mlflow

        values = mask_values(dataclasses.asdict(config))
        mlflow.log_dict(values, "config.json")
        self.log_params(dict(_leaves(values)))

    def log_params(self, params: Mapping[str, Any]) -> None:
        import mlflow

        # A run that goes on may have other workers than it began with; MLflow refuses to change a param.
        known = mlflow.get_run(self.run_id).data.params
        new = {key: str(value)[:_MAX_PARAM_LENGTH] for key, value in params.items() if key not in known}
        mlflow.log_params(new)

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        import mlflow

        mlflow.log_metrics({_metric_name(key): float(value) for key, value in metrics.items()}, step=step)

    def log_values(self, values: Mapping[str, Any], path: str) -> None:
        import mlflow

        mlflow.log_dict(dict(values), path)

    def log_figure(self, figure: "Figure", path: str) -> None:
        import mlflow

        mlflow.log_figure(figure, path)

    def log_dataset(self, *, source: str, digest: str, num_rows: int, context: str) -> None:
        import mlflow
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=Path(mask_uri(source)).name,
            digest=digest[:12],
            source_type="local",
            source=json.dumps({"uri": mask_uri(source)}),
            profile=json.dumps({"num_rows": num_rows}),
        )
        tag = InputTag(key="mlflow.data.context", value=context)
        mlflow.MlflowClient().log_inputs(self.run_id, datasets=[DatasetInput(dataset, [tag])])

    def register_artifact(self, file: Path, *, name: str, alias: str, tags: Mapping[str, str]) -> str | None:
        import mlflow
        from mlflow.exceptions import MlflowException

        mlflow.log_artifact(str(file), artifact_path="similarity")
        client = mlflow.MlflowClient()
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        tags = {**tags, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        known = client.search_model_versions(f"name = '{name}' and run_id = '{self.run_id}'")
        version = next((str(v.version) for v in known if v.tags.get("sha256") == tags["sha256"]), None)
        if version is None:
            source = f"{mlflow.get_artifact_uri()}/similarity"
            version = str(client.create_model_version(name, source, run_id=self.run_id, tags=tags).version)
        client.set_registered_model_alias(name, alias, version)
        return version

    def log_file(self, file: Path) -> None:
        import mlflow

        mlflow.log_artifact(str(file))

    def set_alias(self, name: str, alias: str, version: str) -> None:
        import mlflow

        mlflow.MlflowClient().set_registered_model_alias(name, alias, version)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _quiet() -> None:
    # Git is looked up for a tag of the run; a missing one is no reason for a warning.
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    # Otherwise every new SQLite file announces its tables, and system metrics say that they begin and end.
    for name in ("mlflow.store.db.utils", "mlflow.system_metrics.system_metrics_monitor"):
        logging.getLogger(name).setLevel(logging.WARNING)


def use_store(uri: str) -> None:
    """Point MLflow to a store; an SQLite file's folder is made.

    Raises:
        ConfigError: if the store cannot be opened.
    """
    _quiet()
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
        raise _unusable(uri, error) from error


def _unusable(uri: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"MLflow store {mask_uri(uri)!r} cannot be used ({mask_uri(str(error).splitlines()[0])}): check tracking.uri"
    )


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
        raise _unusable(config.uri, error) from error


def source_commit() -> str:
    """The commit this program runs from, with +changes if files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


@contextmanager
def track(
    config: TrackingConfig,
    *,
    kind: str,
    default_name: str,
    run_id: str | None = None,
    parent_run_id: str | None = None,
    system_metrics: bool = False,
) -> Iterator[NullTracker]:
    """A run that ends FINISHED, or FAILED if the block raises.

    Args:
        config: Where to record; an empty `uri` records nothing.
        kind: Tag `sere.kind`: calibrate, generate or sweep.
        default_name: Run name where the config has none.
        run_id: A run to go on with, instead of a new one.
        parent_run_id: A run below which this one belongs.
        system_metrics: Record this machine's load and memory over time.
    """
    if not config.uri:
        yield NullTracker()
        return
    _quiet()
    import mlflow

    experiment_id = use_experiment(config)
    tags = {"sere.kind": kind, "sere.commit": source_commit()}
    options: dict[str, Any] = {"log_system_metrics": system_metrics}
    if run_id is not None:
        options |= {"run_id": run_id}
    else:
        options |= {"experiment_id": experiment_id, "run_name": config.run_name or default_name}
    if parent_run_id is not None:
        options |= {"nested": True, "parent_run_id": parent_run_id}
    with mlflow.start_run(tags=tags, **options) as run:
        yield MlflowTracker(run.info.run_id)


def resume(config: TrackingConfig, run_id: str | None) -> str | None:
    """The run, if it is still there to go on with; else None."""
    if run_id is None or not config.uri:
        return None
    use_store(config.uri)
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        run = mlflow.get_run(run_id)
    except MlflowException:
        return None
    return run_id if run.info.lifecycle_stage == "active" else None


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
        raise _unusable(uri, error) from error


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
            f"{version_uri} cannot be promoted in {uri} ({str(error).splitlines()[0]}): look at the versions in the MLflow UI, "
            "or give the tracking.uri of the calibration with --uri"
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
            f"{path_or_uri} cannot be read from {tracking_uri} ({str(error).splitlines()[0]}): run `sere calibrate` with this "
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
        raise ConfigError(f"no MLflow store at {uri}: give the tracking.uri of the runs with --uri")
    use_store(uri)
    import mlflow

    found = mlflow.get_experiment_by_name(experiment)
    if found is None:
        names = ", ".join(e.name for e in mlflow.search_experiments()) or "none"
        raise ConfigError(f"no experiment {experiment!r} in {uri} (there: {names}): name one, or set --uri")
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
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{path} of run {run_id} cannot be read ({reason}): check access to the artifact store") from error
