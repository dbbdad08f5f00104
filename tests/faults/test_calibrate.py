"""Processes are killed for real: workers, a node, the driver. Nothing is lost, and the result is that of an undisturbed job."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from sere.calibration_jobs.job import calibrate
from sere.conf.errors import ConfigError
from sere.conf.schema import CalibrateConfig, JudgeConfig
from sere.ops.similarity import SimilarityArtifact
from tests.conftest import DEMO_MODEL, ROOT

pytestmark = pytest.mark.cluster

NUM_SHARDS = 12


@pytest.fixture
def slow(make_config, tmp_path):
    """A job whose shards take long enough to be hit: the demo model."""

    def make(name: str = "out", **changes) -> CalibrateConfig:
        values = {
            "model": str(DEMO_MODEL),
            "data": str(ROOT / "assets" / "calibration.parquet"),
            "num_sequences": 4 * NUM_SHARDS,
            "shard_rows": 4,
            "sequence_length": 64,
            "metrics": ("cosine", "cka"),
            "output": str(tmp_path / name / "similarity.safetensors"),
            "judge": JudgeConfig(held_out_rows=0),
        }
        return make_config(**{**values, **changes})

    return make


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory) -> dict:
    """Filled by the first test that needs it."""
    return {}


def expected(undisturbed: dict, config: CalibrateConfig) -> SimilarityArtifact:
    if not undisturbed:
        undisturbed["artifact"] = SimilarityArtifact.load(calibrate(config).file)
    return undisturbed["artifact"]


def assert_same(file: Path, artifact: SimilarityArtifact) -> None:
    found = SimilarityArtifact.load(file)
    assert found.manifest == artifact.manifest
    assert all(torch.equal(matrix, found.matrices[key]) for key, matrix in artifact.matrices.items())


def num_results(config: CalibrateConfig) -> int:
    return len(list((Path(config.output).parent / "calibration" / "results").glob("shard-*.safetensors")))


def workers() -> list[psutil.Process]:
    """Worker processes that have loaded the model or are at work, of this process's cluster and not of other jobs."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if (process.cmdline() or [""])[0].startswith("ray::CalibrationWorker"):
                found.append(process)
    return found


class During:
    """Does something, once, when a job has finished some shards."""

    def __init__(self, config: CalibrateConfig, num_shards: int, act: Callable[[], None]) -> None:
        self._config, self._num_shards, self._act = config, num_shards, act
        self.done = False
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "During":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(timeout=60)

    def _watch(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if num_results(self._config) >= self._num_shards:
                self._act()
                self.done = True
                return
            time.sleep(0.02)


def test_killed_workers_shard_is_done_elsewhere(cluster, slow, undisturbed, caplog):
    artifact = expected(undisturbed, slow("undisturbed", num_workers=2))
    config = slow(num_workers=2)
    killed = []

    def kill() -> None:
        # One at work: a worker that still loads the model has no shard.
        for _ in range(1000):
            with contextlib.suppress(psutil.NoSuchProcess):
                for victim in workers():
                    if victim.cmdline()[:1] == ["ray::CalibrationWorker.sums"]:
                        victim.kill()
                        killed.append(victim.pid)
                        return
            time.sleep(0.01)

    with During(config, 2, kill) as during:
        done = calibrate(config)
    assert during.done and killed
    assert_same(done.file, artifact)
    assert done.num_done == NUM_SHARDS, "each shard's result was written once"
    assert "a worker died on shard-" in caplog.text


def test_lost_node(cluster, slow, undisturbed):
    """All of a node's processes die at once, Ray's own among them; its replacement comes with another node."""
    artifact = expected(undisturbed, slow("undisturbed", num_workers=2))
    config = slow(num_workers=4)
    lost = cluster.add_node(num_cpus=2)
    with During(config, 2, lambda: cluster.remove_node(lost, allow_graceful=False)) as during:
        done = calibrate(config)
    assert during.done
    assert_same(done.file, artifact)


def test_worker_that_always_dies_is_an_error_that_says_what_to_do(cluster, slow, monkeypatch):
    config = slow(num_workers=1)
    stop = threading.Event()

    def kill_all() -> None:
        while not stop.is_set():
            for process in workers():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.cmdline()[:1] == ["ray::CalibrationWorker.sums"]:
                        process.kill()
            time.sleep(0.02)

    monkeypatch.setattr("sere.calibration_jobs.workers.pool._MAX_ATTEMPTS", 2)
    thread = threading.Thread(target=kill_all)
    thread.start()
    try:
        with pytest.raises(ConfigError, match=r"2 workers died on shard-0000.*lower batch_size.*run the same command again"):
            calibrate(config)
    finally:
        stop.set()
        thread.join()


def sere(config: CalibrateConfig, *settings: str) -> subprocess.Popen:
    """The same job as a command of its own, with a Ray of its own."""
    given = [f"{name}={getattr(config, name)}" for name in ("model", "data", "num_sequences", "shard_rows", "sequence_length")]
    given += [f"{name}={getattr(config, name)}" for name in ("block_tokens", "batch_size", "output", "num_workers")]
    given += ["metrics=[cosine,cka]", "judge.held_out_rows=0", *settings]
    command = [sys.executable, "-m", "sere.pipeline.cli", "calibrate", str(ROOT / "conf" / "calibrate.yaml"), *given]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def interrupted(config: CalibrateConfig, tracking: str, num_shards: int, signal_number: int) -> tuple[int, str]:
    """Start the command, and send the driver a signal when it has finished some shards."""
    process = sere(config, tracking)
    try:
        deadline = time.monotonic() + 120
        while num_results(config) < num_shards and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal_number)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_killed_driver_goes_on_where_it_was(cluster, slow, undisturbed, tmp_path):
    """Killed once and interrupted once: at most the shards in flight are done again, in one MLflow run."""
    import mlflow

    artifact = expected(undisturbed, slow("undisturbed", num_workers=2))
    config, tracking = slow(num_workers=1), f"tracking.uri=sqlite:///{tmp_path}/ml.db"
    folder = Path(config.output).parent / "calibration" / "results"
    before: dict[str, int] = {}
    for num_shards, signal_number in ((3, signal.SIGKILL), (7, signal.SIGINT)):
        status, output = interrupted(config, tracking, num_shards, signal_number)
        assert status == (130 if signal_number == signal.SIGINT else -signal.SIGKILL), output
        if signal_number == signal.SIGINT:
            assert "the same command continues" in output and "Traceback" not in output
        now = {file.name: file.stat().st_mtime_ns for file in folder.glob("shard-*")}
        assert len(now) >= num_shards and before.items() <= now.items(), "what was finished is not done again"
        before = now
    assert not Path(config.output).exists()
    process = sere(config, tracking)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert "version 1 of" in output
    after = {file.name: file.stat().st_mtime_ns for file in folder.glob("shard-*")}
    assert before.items() <= after.items() and len(after) == NUM_SHARDS
    found = SimilarityArtifact.load(config.output)
    for key, matrix in artifact.matrices.items():
        torch.testing.assert_close(found.matrices[key], matrix, atol=1e-6, rtol=0)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/ml.db")
    (run,) = client.search_runs([client.get_experiment_by_name("sere-calibration").experiment_id])
    assert run.info.status == "FINISHED"
    again = sere(config, tracking)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and "Finished before" in output
