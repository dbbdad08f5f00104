"""Runs, versions and aliases in a real MLflow store."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import mlflow
import pytest
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from sere.conf.errors import ConfigError, TryAgainError
from sere.conf.schema import CalibrateConfig, TrackingConfig
from sere.pipeline.runtime.interrupts import uninterrupted
from sere.pipeline.tracking.circumstances import CIRCUMSTANCES
from sere.pipeline.tracking.registry import promote, resolve_artifact
from sere.pipeline.tracking.runs import download_file, read_history, read_runs
from sere.pipeline.tracking.tracker import NullTracker, resume, track
from tests.servers import free_port, wait_until_listening


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


def test_interrupted_at_any_moment_the_store_is_left_in_order(tracking):
    """The database is not left locked, the interrupt is not lost, and the run says that it failed."""
    rng = random.Random(0)
    with track(tracking, kind="generate", default_name="first") as tracker:
        tracker.log_metrics({"m": 0.0})
    for number in range(20):
        timer = threading.Timer(rng.uniform(0, 0.1), os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt), track(tracking, kind="generate", default_name="n") as tracker:
            timer.start()
            for step in range(10_000):
                tracker.log_metrics({f"m{step % 7}": step}, step=step)
        timer.join()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert mlflow.active_run() is None, number
    runs = mlflow.search_runs(experiment_names=["e"], output_format="list")
    assert sorted(run.info.status for run in runs) == ["FAILED"] * 20 + ["FINISHED"]


def test_a_second_interrupt_does_not_wait():
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("goes on")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_store_that_fails_meanwhile_holds_up_nothing(tracking, monkeypatch, caplog):
    with track(tracking, kind="generate", default_name="n") as tracker:
        tracker.log_progress({"progress/rows": 1}, step=1)
        tracker._sender.submit(int).result()
        monkeypatch.setattr(mlflow, "log_metrics", lambda *_, **__: time.sleep(0.02) or 1 / 0)
        started = time.monotonic()
        for step in range(10_000):
            tracker.log_progress({"progress/rows": step}, step=step)
        assert time.monotonic() - started < 3
        tracker._sender.submit(int).result()
        monkeypatch.undo()
        tracker.log_progress({"progress/rows": 9}, step=9)
        tracker._sender.submit(int).result()
    assert read_history(tracking.uri, tracker.run_id, "progress/rows") == [(1, 1), (9, 9)]
    assert caplog.text.count("does not take metrics") == 1


def test_a_store_that_has_worked_may_work_again(tracking):
    """Status 75, where an address that never answered is to be changed."""
    down = mlflow.exceptions.MlflowException("the store is down")
    again = r"the store is down\): run the same command again"
    with pytest.raises(TryAgainError, match=again), track(tracking, kind="generate", default_name="n"):
        raise down
    wrong = mlflow.exceptions.MlflowException("no such metric", error_code=INVALID_PARAMETER_VALUE)
    with pytest.raises(ConfigError, match="no such metric") as raised, track(tracking, kind="generate", default_name="n"):
        raise wrong
    assert not isinstance(raised.value, TryAgainError)
    silent = TrackingConfig(uri=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match=r"check tracking\.uri") as raised, track(silent, kind="generate", default_name="n"):
        pytest.fail("there is no store")
    assert not isinstance(raised.value, TryAgainError)
    with pytest.raises(TryAgainError, match="run the same command again when it answers"):
        resume(silent, "0" * 32)


def test_a_run_that_is_gone_is_not_gone_on_with_and_one_that_is_not_found_now_is(tracking, monkeypatch):
    with track(tracking, kind="generate", default_name="n") as tracker:
        pass
    assert resume(tracking, tracker.run_id) == tracker.run_id and resume(tracking, "0" * 32) is None

    def fail(run_id):
        raise mlflow.exceptions.MlflowException("the store is down")

    monkeypatch.setattr(mlflow, "get_run", fail)
    with pytest.raises(TryAgainError, match="the store is down"):
        resume(tracking, tracker.run_id)


def test_what_only_reads_makes_no_store(tmp_path):
    uri = f"sqlite:///{tmp_path}/folder/typo.db"
    readings = [
        lambda: read_runs(uri, "e"),
        lambda: read_history(uri, "0" * 32, "m"),
        lambda: download_file(uri, "0" * 32, "f", folder=tmp_path),
        lambda: promote("models:/m/1", uri=uri),
        lambda: promote("models:/m@candidate", uri=uri),
        lambda: resolve_artifact("models:/m@candidate", tracking_uri=uri, folder=tmp_path),
    ]
    for read in readings:
        with pytest.raises(ConfigError, match="no MLflow store at"):
            read()
    assert not (tmp_path / "folder").exists()


def test_a_run_says_what_it_ran_on(tracking):
    with track(tracking, kind="generate", default_name="n") as tracker:
        pass
    # A run that goes on elsewhere keeps what it began with.
    with track(tracking, kind="generate", default_name="n", run_id=tracker.run_id):
        pass
    (run,) = read_runs(tracking.uri, "e")
    assert all(run["params"][name] for name in CIRCUMSTANCES)
    assert run["params"]["versions.torch"][0].isdigit() and "vllm" in "".join(CIRCUMSTANCES)


def test_long_params_are_kept_up_to_the_limit_of_mlflow(tracking):
    with track(tracking, kind="generate", default_name="n") as tracker:
        tracker.log_params({"template": "x" * 5999, "longer": "x" * 9999})
    (run,) = read_runs(tracking.uri, "e")
    assert len(run["params"]["template"]) == 5999 and len(run["params"]["longer"]) == 6000


@pytest.mark.slow
def test_a_password_in_the_address_of_a_server_is_not_printed(tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    server = subprocess.Popen(
        [*command, "--backend-store-uri", f"sqlite:///{tmp_path}/ml.db", "--default-artifact-root", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until_listening(server, port)
        code = f"""
from sere.conf.schema import TrackingConfig
from sere.pipeline.tracking.tracker import track
config = TrackingConfig(uri="http://user:hunter2@127.0.0.1:{port}", experiment="e")
with track(config, kind="generate", default_name="n") as tracker:
    tracker.log_metrics({{"m": 1.0}})
print("done")
"""
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0 and "done" in ran.stdout, ran.stderr
        assert "hunter2" not in ran.stdout + ran.stderr
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
