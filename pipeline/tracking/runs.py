"""What is in an MLflow store: runs, their metrics and files."""

from pathlib import Path
from typing import Any

from sere.conf.errors import ConfigError
from sere.conf.masking import mask_uri
from sere.pipeline.tracking.store import first_line, read_store


def read_runs(uri: str, experiment: str) -> list[dict[str, Any]]:
    """The finished generate runs of an experiment, oldest first.

    Returns:
        Of each: `run_id`, `name`, `params`, `metrics`, `started_ms` (since 1970), `commit`, and `data_digest` ("" if unknown).

    Raises:
        ConfigError: if there is no such experiment.
    """
    read_store(uri)
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
    read_store(uri)
    import mlflow

    values = mlflow.MlflowClient().get_metric_history(run_id, metric)
    return sorted({v.step: v.value for v in sorted(values, key=lambda v: v.timestamp)}.items())


def download_file(uri: str, run_id: str, path: str, *, folder: Path) -> Path | None:
    """Download a file among a run's artifacts into `folder`; None if the run has none of that path.

    Raises:
        ConfigError: if the store of the artifacts cannot be read.
    """
    read_store(uri)
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
