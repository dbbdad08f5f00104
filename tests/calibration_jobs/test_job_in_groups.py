"""The whole job with shards summed up in groups: any number of workers, progress, and jobs begun before there were groups."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import mlflow
import pytest
import torch

from sere.calibration_jobs.job import calibrate
from sere.calibration_jobs.metrics.merge import InOrder
from sere.calibration_jobs.workers.results import Results
from sere.conf.nested import digest_of
from sere.conf.schema import TrackingConfig
from sere.ops.similarity import SimilarityArtifact
from sere.pipeline.runtime.storage import Storage
from tests.calibration_jobs.conftest import assert_same, copied, quality, results

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster")]


@pytest.fixture
def in_few_groups(monkeypatch):
    """Ten shards are four groups, with a checkpoint after each shard."""
    monkeypatch.setattr("sere.calibration_jobs.job.most_groups", lambda num_bytes: 4)
    monkeypatch.setattr("sere.calibration_jobs.job.checkpoint_interval", lambda *_: 0.0)


def test_any_number_of_workers_gives_the_same_in_groups(plain_job, not_judged, in_few_groups, tmp_path, monkeypatch):
    jobs = []
    for num_workers, max_bytes in ((1, 2**40), (3, 0)):
        monkeypatch.setattr("sere.calibration_jobs.job.InOrder", functools.partial(InOrder, max_bytes=max_bytes))
        output = str(tmp_path / str(num_workers) / "similarity.safetensors")
        jobs.append(calibrate(not_judged(output=output, num_workers=num_workers)))
    groups = {"shard-000000", "shard-000001", "shards-000002-000008", "shards-000003-000009", "weights"}
    for done in jobs:
        assert {name.removesuffix(".safetensors") for name in results(done.file)} == groups, "no checkpoint is left"
        assert done.num_done == 5
    first, other = (SimilarityArtifact.load(done.file) for done in jobs)
    assert_same(first, other)
    by_shards = SimilarityArtifact.load(plain_job.file)
    assert first.manifest["num_tokens"] == by_shards.manifest["num_tokens"]
    for key, matrix in first.matrices.items():
        torch.testing.assert_close(matrix, by_shards.matrices[key], atol=1e-6, rtol=0)
    # After 2 shards, when 4 and 8 are passed, which is at the end; one by one also at 4 and 8.
    growths = [[step["num_tokens"] for step in quality(done.file)["reliability"]] for done in (plain_job, jobs[0])]
    assert len(growths[0]) == 4 and growths[1] == [growths[0][0], growths[0][-1]]


def test_progress_is_told_shard_by_shard(not_judged, in_few_groups, tmp_path):
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/ml.db", experiment="e")
    done = calibrate(not_judged(num_workers=2, metrics=("cosine",), tables=(), tracking=tracking))
    try:
        client = mlflow.MlflowClient(tracking.uri)
        (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
        told = client.get_metric_history(run.info.run_id, "progress/tokens")
    finally:
        mlflow.set_tracking_uri(None)
    assert [point.step for point in told] == list(range(1, 11))
    assert told[-1].value == SimilarityArtifact.load(done.file).manifest["num_tokens"]
    assert [point.value for point in told] == sorted({point.value for point in told})


def test_a_job_begun_before_there_were_groups_goes_on_with_its_shards(plain_job, not_judged, in_few_groups):
    config = copied(plain_job, not_judged(num_workers=2))
    folder = Path(config.output).parent / "calibration"
    job = json.loads((folder / "job.json").read_text())
    del job["settings"]["max_groups"]
    (folder / "job.json").write_text(json.dumps(job))
    # Results carry the digest of the settings.
    digest = digest_of(job["settings"])
    results_there = Results(Storage(str(folder)), SimilarityArtifact.load(config.output).manifest["config_digest"])
    stored = {name: results_there.load(name) for name in ("shard-000001", "shard-000002", "shard-000007")}
    shutil.rmtree(folder / "results")
    for name, result in stored.items():
        del result[1]["num_shards"]
        Results(Storage(str(folder)), digest).save(name, result)
    before = results(config.output)
    Path(config.output).unlink()
    done = calibrate(config)
    assert done.num_done == 8, "seven shards, and the weights"
    now = results(done.file)
    assert before.items() <= now.items() and len(now) == 11
    first, other = (SimilarityArtifact.load(file) for file in (plain_job.file, done.file))
    assert_same(dataclasses.replace(first, manifest={**first.manifest, "config_digest": digest}), other)
