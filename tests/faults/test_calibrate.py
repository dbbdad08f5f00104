"""Processes are killed for real: workers, a node, the driver. Nothing is lost, and the result is that of an undisturbed job."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open

from sere.calibration_jobs.job import calibrate
from sere.conf.errors import ConfigError
from sere.conf.schema import CalibrateConfig, JudgeConfig
from sere.ops.similarity import SimilarityArtifact
from sere.pipeline.tracking.tracker import NullTracker
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


def num_kept(config: CalibrateConfig) -> int:
    """How many shards the checkpoint of the first long group has."""
    file = Path(config.output).parent / "calibration" / "results" / "shards-000002-000010.checkpoint.safetensors"
    with contextlib.suppress(FileNotFoundError), safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["info"])["num_shards"]
    return 0


class During:
    """Does something, once, when a job has come so far."""

    def __init__(self, is_time: Callable[[], bool], act: Callable[[], None]) -> None:
        self._is_time, self._act = is_time, act
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
            if self._is_time():
                self._act()
                self.done = True
                return
            time.sleep(0.02)


def kill_one() -> None:
    """One at work: a worker that still loads the model has no shard."""
    for _ in range(1000):
        with contextlib.suppress(psutil.NoSuchProcess):
            for victim in workers():
                if victim.cmdline()[:1] == ["ray::CalibrationWorker.sums"]:
                    victim.kill()
                    return
        time.sleep(0.01)
    raise AssertionError("no worker was at work")


def test_killed_workers_shard_is_done_elsewhere(cluster, slow, undisturbed, caplog):
    artifact = expected(undisturbed, slow("undisturbed", num_workers=2))
    config = slow(num_workers=2)
    with During(lambda: num_results(config) >= 2, kill_one) as during:
        done = calibrate(config)
    assert during.done
    assert_same(done.file, artifact)
    assert done.num_done == NUM_SHARDS, "each shard's result was written once"
    assert "a worker died on shard-" in caplog.text


@pytest.fixture
def in_groups(monkeypatch):
    """Two groups of one shard and two of five, with a checkpoint after each shard."""
    monkeypatch.setattr("sere.calibration_jobs.job.most_groups", lambda num_bytes: 4)
    monkeypatch.setattr("sere.calibration_jobs.job.checkpoint_interval", lambda *_: 0.0)


@pytest.fixture(scope="module")
def undisturbed_groups(cluster, tmp_path_factory) -> dict:
    """Filled by the first test that needs it."""
    return {}


def test_killed_workers_group_goes_on_from_its_checkpoint(cluster, slow, in_groups, undisturbed_groups, monkeypatch, caplog):
    artifact = expected(undisturbed_groups, slow("undisturbed_groups", num_workers=2))
    steps = []
    monkeypatch.setattr(NullTracker, "log_progress", lambda self, metrics, *, step: steps.append(step))
    config = slow(num_workers=1)
    with During(lambda: num_kept(config) >= 3, kill_one) as during:
        done = calibrate(config)
    assert during.done and "a worker died on shard-" in caplog.text
    assert steps == list(range(1, NUM_SHARDS + 1)), "no shard that was kept is done again"
    assert_same(done.file, artifact)


def test_lost_node_in_groups(cluster, slow, in_groups, undisturbed_groups):
    """What it sent, and nobody has read, is lost with it."""
    artifact = expected(undisturbed_groups, slow("undisturbed_groups", num_workers=2))
    config = slow(num_workers=4)
    lost = cluster.add_node(num_cpus=2)
    with During(lambda: num_kept(config) >= 2, lambda: cluster.remove_node(lost, allow_graceful=False)) as during:
        done = calibrate(config)
    assert during.done
    assert_same(done.file, artifact)


def test_lost_node(cluster, slow, undisturbed):
    """All of a node's processes die at once, Ray's own among them; its replacement comes with another node."""
    artifact = expected(undisturbed, slow("undisturbed", num_workers=2))
    config = slow(num_workers=4)
    lost = cluster.add_node(num_cpus=2)
    with During(lambda: num_results(config) >= 2, lambda: cluster.remove_node(lost, allow_graceful=False)) as during:
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


# The command in a few groups, with a checkpoint after each shard.
IN_GROUPS = """
import sere.calibration_jobs.job, sere.pipeline.cli
sere.calibration_jobs.job.most_groups = lambda num_bytes: 4
sere.calibration_jobs.job.checkpoint_interval = lambda *_: 0.0
sere.pipeline.cli.main()
"""


def sere(config: CalibrateConfig, *settings: str, start: Sequence[str] = ("-m", "sere.pipeline.cli")) -> subprocess.Popen:
    """The same job as a command of its own, with a Ray of its own."""
    given = [f"{name}={getattr(config, name)}" for name in ("model", "data", "num_sequences", "shard_rows", "sequence_length")]
    given += [f"{name}={getattr(config, name)}" for name in ("block_tokens", "batch_size", "output", "num_workers")]
    given += ["metrics=[cosine,cka]", "judge.held_out_rows=0", *settings]
    command = [sys.executable, *start, "calibrate", str(ROOT / "conf" / "calibrate.yaml"), *given]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def interrupted(process: subprocess.Popen, is_time: Callable[[], bool], signal_number: int) -> str:
    """Send a driver a signal when it has come so far; returns what it printed."""
    try:
        deadline = time.monotonic() + 120
        while not is_time() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal_number)
        return process.communicate(timeout=60)[0]
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
        process = sere(config, tracking)
        output = interrupted(process, lambda number=num_shards: num_results(config) >= number, signal_number)
        assert process.returncode == (130 if signal_number == signal.SIGINT else -signal.SIGKILL), output
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


def test_killed_driver_goes_on_from_a_checkpoint(cluster, slow, in_groups, undisturbed_groups, tmp_path):
    import mlflow

    artifact = expected(undisturbed_groups, slow("undisturbed_groups", num_workers=2))
    config, uri = slow(num_workers=1), f"sqlite:///{tmp_path}/ml.db"
    interrupted(sere(config, f"tracking.uri={uri}", start=("-c", IN_GROUPS)), lambda: num_kept(config) >= 3, signal.SIGKILL)
    kept, killed_at = num_kept(config), time.time() * 1000
    assert kept >= 3
    again = sere(config, f"tracking.uri={uri}", start=("-c", IN_GROUPS))
    output, _ = again.communicate(timeout=180)
    assert again.returncode == 0, output
    found = SimilarityArtifact.load(config.output)
    for key, matrix in artifact.matrices.items():
        torch.testing.assert_close(found.matrices[key], matrix, atol=1e-6, rtol=0)
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("sere-calibration").experiment_id])
    told = client.get_metric_history(run.info.run_id, "progress/tokens")
    # The two groups of one shard, and then what the checkpoint lacks.
    steps = [point.step for point in told if point.timestamp > killed_at]
    assert steps == [1, 2, *range(3 + kept, NUM_SHARDS + 1)]
