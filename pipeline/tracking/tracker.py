"""Recording a run in MLflow. `track` with an empty URI records nothing.

What is recorded in the main thread is not interrupted half way; what only says how far a job is, is sent in the background.
"""

import dataclasses
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sere.conf.errors import TryAgainError
from sere.conf.masking import mask_uri, mask_values
from sere.conf.nested import flatten
from sere.conf.schema import TrackingConfig
from sere.pipeline.runtime.interrupts import uninterrupted
from sere.pipeline.tracking.circumstances import circumstances, source_commit
from sere.pipeline.tracking.store import first_line, quiet, unusable, use_experiment, use_store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_METRIC_NAME = 250
# MLflow's own limit.
_MAX_PARAM_LENGTH = 6000
# A column that is no task but an identifier would make a metric of each row.
_TASK, _MAX_TASKS = "exact_match/", 200
# Metrics of progress that wait to be sent; more are left out.
_MAX_WAITING = 100

_log = logging.getLogger(__name__)


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

    def log_progress(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Record numbers of a moment, in the background: a store that does not answer neither ends the job nor holds it up."""

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
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._waiting: list[Future[None]] = []
        self._is_losing = False

    def close(self) -> None:
        """Send what waits, unless the store does not take it."""
        self._sender.shutdown(wait=True, cancel_futures=self._is_losing)

    def log_progress(self, metrics: Mapping[str, float], *, step: int) -> None:
        self._waiting = [sent for sent in self._waiting if not sent.done()]
        if len(self._waiting) < _MAX_WAITING:
            self._waiting.append(self._sender.submit(self._send, metrics, step, int(time.time() * 1000)))

    def _send(self, metrics: Mapping[str, float], step: int, timestamp: int) -> None:
        import mlflow

        named = {_metric_name(key): float(value) for key, value in metrics.items()}
        try:
            # The active run is one of the main thread.
            mlflow.log_metrics(named, step=step, run_id=self.run_id, timestamp=timestamp)
            self._is_losing = False
        except Exception as error:
            # Also what the network and the database raise. Nothing of it is worth a job.
            if not self._is_losing:
                _log.warning("MLflow does not take metrics of the progress; the job goes on: %s", first_line(error))
            self._is_losing = True

    @uninterrupted()
    def log_config(self, config: Any) -> None:
        import mlflow

        values = mask_values(dataclasses.asdict(config))
        mlflow.log_dict(values, "config.json")
        self.log_params(flatten(values))

    @uninterrupted()
    def log_params(self, params: Mapping[str, Any]) -> None:
        import mlflow

        # A run that goes on may have other workers than it began with; MLflow refuses to change a param.
        known = mlflow.get_run(self.run_id).data.params
        new = {key: str(value)[:_MAX_PARAM_LENGTH] for key, value in params.items() if key not in known}
        mlflow.log_params(new)

    @uninterrupted()
    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        import mlflow

        tasks = [key for key in metrics if key.startswith(_TASK)]
        if len(tasks) > _MAX_TASKS:
            _log.warning("%d tasks: exact match of the first %d goes to MLflow by task", len(tasks), _MAX_TASKS)
        left_out = set(tasks[_MAX_TASKS:])
        kept = {_metric_name(key): float(value) for key, value in metrics.items() if key not in left_out}
        mlflow.log_metrics(kept, step=step)

    @uninterrupted()
    def log_values(self, values: Mapping[str, Any], path: str) -> None:
        import mlflow

        mlflow.log_dict(dict(values), path)

    @uninterrupted()
    def log_figure(self, figure: "Figure", path: str) -> None:
        import mlflow

        mlflow.log_figure(figure, path)

    @uninterrupted()
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

    @uninterrupted()
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

    @uninterrupted()
    def log_file(self, file: Path) -> None:
        import mlflow

        mlflow.log_artifact(str(file))

    @uninterrupted()
    def set_alias(self, name: str, alias: str, version: str) -> None:
        import mlflow

        mlflow.MlflowClient().set_registered_model_alias(name, alias, version)


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

    Raises:
        ConfigError: if the store cannot be used; a TryAgainError if it could when the run began. What the block had finished
            by then stays.

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
    quiet()
    import mlflow
    from mlflow.exceptions import MlflowException

    experiment_id = use_experiment(config)
    tags = {"sere.kind": kind, "sere.commit": source_commit()}
    options: dict[str, Any] = {"log_system_metrics": system_metrics}
    if run_id is not None:
        options |= {"run_id": run_id}
    else:
        options |= {"experiment_id": experiment_id, "run_name": config.run_name or default_name}
    if parent_run_id is not None:
        options |= {"nested": True, "parent_run_id": parent_run_id}
    tracker, status = None, "FAILED"
    try:
        with uninterrupted():
            tracker = MlflowTracker(mlflow.start_run(tags=tags, **options).info.run_id)
            tracker.log_params(circumstances())
        yield tracker
        status = "FINISHED"
    except MlflowException as error:
        raise unusable(config.uri, error, has_worked=tracker is not None) from error
    finally:
        if tracker is not None:
            with uninterrupted():
                tracker.close()
                _end_run(config.uri, status)


def _end_run(uri: str, status: str) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        mlflow.end_run(status)
    except MlflowException as error:
        # What the job had to record is there, or its error is the one to be told.
        _log.warning("%s; the run stays marked as running", unusable(uri, error))


def resume(config: TrackingConfig, run_id: str | None) -> str | None:
    """The run, if it is still there to go on with; else None.

    Raises:
        TryAgainError: if the store does not answer.
    """
    if run_id is None or not config.uri:
        return None
    use_store(config.uri, has_worked=True)
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        run = mlflow.get_run(run_id)
    except MlflowException as error:
        failure = unusable(config.uri, error, has_worked=True)
        if isinstance(failure, TryAgainError):
            raise failure from error
        return None
    return run_id if run.info.lifecycle_stage == "active" else None
