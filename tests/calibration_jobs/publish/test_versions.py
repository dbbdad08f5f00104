"""Versions of an artifact, looked at and promoted: in SQLite and through an MLflow server over HTTP."""

import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import mlflow
import pytest
import torch

from sere.calibration_jobs.judge.champion import read_champion
from sere.calibration_jobs.publish.inspect import inspect
from sere.calibration_jobs.publish.promote import promote as print_promotion
from sere.conf.errors import ConfigError
from sere.conf.schema import CalibrateConfig, TrackingConfig
from sere.ops.model_digest import ModelIdentity
from sere.ops.similarity import SimilarityArtifact
from sere.pipeline.tracking.registry import alias_version, promote, resolve_artifact
from sere.pipeline.tracking.tracker import resume, track
from tests.calibration_jobs.publish.artifacts import artifact
from tests.servers import free_port

# MLflow makes a new data base in each, and its server starts.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real MLflow server on a port of the loopback interface."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/ml.db", "--artifacts-destination", f"{folder}/artifacts"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env={**os.environ, "PYTHONPATH": ""})
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail(f"the MLflow server did not start: {(folder / 'log').read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(params=["sqlite", "http"])
def store(request, tmp_path):
    uri = f"sqlite:///{tmp_path}/ml.db" if request.param == "sqlite" else request.getfixturevalue("server")
    yield TrackingConfig(uri=uri, experiment=f"versions-{tmp_path.name}")
    mlflow.set_tracking_uri(None)


def register(store, name: str, tmp_path, **changes) -> str:
    file = artifact(**changes).save(tmp_path / "similarity.safetensors")
    with track(store, kind="calibrate", default_name="n") as tracker:
        tracker.log_file(file)
        return tracker.register_artifact(file, name=name, alias="candidate", tags={"model": "m"})


def test_versions_and_champion(store, tmp_path, printed):
    name = f"model-{tmp_path.name}"
    assert alias_version(store.uri, name, "champion") is None
    assert [register(store, name, tmp_path, seed=seed) for seed in (0, 1)] == ["1", "2"]
    assert (alias_version(store.uri, name, "candidate"), alias_version(store.uri, name, "champion")) == ("2", None)
    print_promotion(f"models:/{name}/1", uri=store.uri, console=printed)
    print_promotion(f"models:/{name}@candidate", uri=store.uri, console=printed)
    assert printed.file.getvalue().splitlines() == [
        f"{name}: champion is version 1, was none",
        f"{name}: champion is version 2, was 1",
    ]
    champion = resolve_artifact(f"models:/{name}@champion", tracking_uri=store.uri, folder=tmp_path / "download")
    expected = artifact(1)
    found = SimilarityArtifact.load(champion)
    assert all(torch.equal(found.matrices[key], matrix) for key, matrix in expected.matrices.items())
    inspect(f"models:/{name}/1", uri=store.uri, output=str(tmp_path / "pictures"), console=printed)
    assert "data-0" in printed.file.getvalue() and (tmp_path / "pictures" / "heatmaps" / "layer_001.png").is_file()
    for wrong in (f"models:/{name}/7", f"models:/{name}@nobody", "models:/unknown/1"):
        # A password in the address is not shown; the server asks for none.
        with pytest.raises(ConfigError, match="cannot be promoted") as raised:
            promote(wrong, uri=store.uri.replace("http://", "http://user:hunter2@"))
        assert "hunter2" not in str(raised.value)
    with pytest.raises(ConfigError, match="must be models:/NAME/VERSION or models:/NAME@ALIAS"):
        promote("some/path", uri=store.uri)


def test_a_run_goes_on_and_registers_once(store, tmp_path):
    name, file = f"model-{tmp_path.name}", artifact().save(tmp_path / "similarity.safetensors")
    found = []
    run_id = None
    for workers in (1, 2):
        with track(store, kind="calibrate", default_name="n", run_id=resume(store, run_id)) as tracker:
            run_id = tracker.run_id
            tracker.log_params({"num_workers": workers, f"only_{workers}": 1})
            tracker.log_metrics({"a": workers}, step=3)
            found.append((tracker.register_artifact(file, name=name, alias="candidate", tags={"model": "m"}), run_id))
    assert found[0] == found[1] == ("1", run_id)
    run = mlflow.MlflowClient(store.uri).get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.metrics["a"] == 2
    assert (run.data.params["num_workers"], run.data.params["only_2"]) == ("1", "1"), "a param keeps its first value"
    assert resume(store, "0" * 32) is None and resume(TrackingConfig(uri=""), run_id) is None


def test_a_champion_is_compared_only_if_it_is_of_the_models_weights(store, tmp_path):
    name = f"model-{tmp_path.name}"
    promote(f"models:/{name}/{register(store, name, tmp_path)}", uri=store.uri)
    config = CalibrateConfig(model="m", data="d", output="o", promote_if="lower_held_out_error", tracking=store)

    def read(identity: ModelIdentity):
        model = SimpleNamespace(num_experts=6, identity=identity)
        return read_champion(SimpleNamespace(config=config, name=name, run_id=None, model=model))

    assert read(ModelIdentity(digest="d", commit="c" * 40)).version == "1"
    for other in (ModelIdentity(digest="e"), ModelIdentity(commit="c" * 40)):
        with pytest.raises(ConfigError, match=r"champion version 1 of .* is not, or not known to be, .*set promote_if=never"):
            read(other)
