"""Runs, versions and aliases in a real MLflow store."""

import mlflow
import pytest

from calibration_jobs.tracking import NullTracker, read_runs, resolve_artifact, track
from conf.schema import CalibrateConfig, ConfigError, TrackingConfig


@pytest.fixture
def tracking(tmp_path):
    yield TrackingConfig(uri=f"sqlite:///{tmp_path}/ml.db", experiment="e")
    mlflow.set_tracking_uri(None)


def test_run_is_recorded(tracking):
    config = CalibrateConfig(model="m", data="d", output="o", tracking=tracking)
    with track(tracking, kind="generate", default_name="n") as tracker:
        tracker.log_config(config)
        tracker.log_metrics({"exact_match": 0.5, "transfer/c++ [x]": 1})
        tracker.log_dataset(source="/data/d.parquet", digest="abcdef0123456789", num_rows=3, context="generation")
    (run,) = read_runs(tracking.uri, "e")
    assert run["name"] == "n" and run["metrics"] == {"exact_match": 0.5, "transfer/c__ _x_": 1}
    assert run["params"]["tracking.experiment"] == "e" and run["params"]["batch_size"] == "32"
    assert mlflow.artifacts.load_dict(f"runs:/{run['run_id']}/config.json")["model"] == "m"
    (dataset,) = mlflow.get_run(run["run_id"]).inputs.dataset_inputs
    assert dataset.dataset.name == "d.parquet" and dataset.dataset.digest == "abcdef012345"
    assert mlflow.get_run(run["run_id"]).data.tags["sere.commit"]


def test_failed_run_is_marked_and_not_compared(tracking):
    with pytest.raises(KeyError), track(tracking, kind="generate", default_name="n"):
        raise KeyError
    assert read_runs(tracking.uri, "e") == []
    (run,) = mlflow.search_runs(experiment_names=["e"], output_format="list")
    assert run.info.status == "FAILED"


def test_versions_and_alias(tracking, tmp_path):
    file = tmp_path / "similarity.safetensors"
    for content in ("one", "two"):
        file.write_text(content)
        with track(tracking, kind="calibrate", default_name="n") as tracker:
            version = tracker.register_artifact(file, name="model", alias="candidate", tags={"model": "m"})
    assert version == "2"

    def content(uri, name):
        folder = resolve_artifact(uri, tracking_uri=tracking.uri, folder=tmp_path / name)
        return (folder / "similarity.safetensors").read_text()

    assert content("models:/model@candidate", "a") == "two"
    assert content("models:/model/1", "b") == "one"
    with pytest.raises(ConfigError, match="models:/model@best cannot be read"):
        content("models:/model@best", "c")
    with pytest.raises(ConfigError, match=r"set tracking\.uri"):
        resolve_artifact("models:/model@candidate", tracking_uri="", folder=tmp_path)
    assert resolve_artifact("a/path", tracking_uri="", folder=tmp_path).name == "path"


def test_no_tracking():
    with track(TrackingConfig(uri=""), kind="generate", default_name="n") as tracker:
        assert type(tracker) is NullTracker
        tracker.log_config(None)
        tracker.log_metrics({"a": 1})
        assert tracker.register_artifact("f", name="n", alias="a", tags={}) is None


def test_unknown_experiment(tracking):
    with track(tracking, kind="generate", default_name="n"):
        pass
    with pytest.raises(ConfigError, match=r"no experiment 'x' in .* \(there: e"):
        read_runs(tracking.uri, "x")
