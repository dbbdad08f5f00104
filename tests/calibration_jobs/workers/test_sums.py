"""A worker's sums over a group of shards: interrupted anywhere and continued by another worker, they are the same bits."""

import itertools
import math

import pytest
import torch

from sere.calibration_jobs.metrics.base import ShardSums
from sere.calibration_jobs.shards import TokenRow
from sere.calibration_jobs.workers.results import Results
from sere.calibration_jobs.workers.worker import CalibrationWorker
from sere.conf.errors import ConfigError
from sere.pipeline.runtime.storage import Storage
from tests.calibration_jobs.conftest import config_of

DOMAINS = ("digits", "letters")
JOB_TABLES = ("norms", "protected", "beta", "folds", "means", "surrogates")


@pytest.fixture(scope="module")
def worker(tiny_model, texts, tmp_path_factory):
    found = CalibrationWorker(config_of(tiny_model, texts, tmp_path_factory.mktemp("worker")), 16)
    found.ready()
    return found


def rows(shard: int) -> list[TokenRow]:
    """One domain is in every other shard only."""
    domains = DOMAINS if shard % 2 else DOMAINS[:1]
    return [TokenRow(tuple((7 * shard + 3 * i + j * j) % 250 for j in range(20)), domains[i % len(domains)]) for i in range(4)]


SHARDS = [rows(shard) for shard in range(4)]


def same(first, second) -> bool:
    return first[0].keys() == second[0].keys() and all(torch.equal(tensor, second[0][key]) for key, tensor in first[0].items())


def counted(result) -> dict:
    return {key: value for key, value in result[1].items() if key not in ("elapsed_s", "peak_memory_bytes")}


def whole(worker):
    *_, last = worker.sums(SHARDS, DOMAINS, JOB_TABLES)
    return last


def test_progress_has_no_sums_and_the_last_has_all(worker):
    told = list(worker.sums(SHARDS, DOMAINS, JOB_TABLES))
    assert [info["num_shards"] for _, info in told] == [1, 2, 3, 4] and [bool(tensors) for tensors, _ in told] == [
        False
    ] * 3 + [True]
    assert [info["num_tokens"] for _, info in told][::3] == [
        {"all": 80, "0": 80, "1": 0},
        {"all": 320, "0": 240, "1": 80},
    ]
    sums = ShardSums.from_result(told[-1])
    assert {key.metric for key in sums.sums} == {"frobenius", "cosine", "cka"} and {key.domain for key in sums.sums} == {
        None,
        0,
        1,
    }
    assert {tensor.dtype for tensor in sums.tables.values()} == {torch.float32}
    assert {key.table for key in sums.tables} == set(JOB_TABLES)


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_another_worker_goes_on_from_a_checkpoint_to_the_same_bits(worker, num_shards, tmp_path):
    results = Results(Storage(str(tmp_path)), "digest")
    told = worker.sums(SHARDS, DOMAINS, JOB_TABLES, checkpoint_s=0)
    # Kept as the driver keeps it, before the worker adds to it.
    for result in itertools.islice(told, num_shards):
        results.save("group.checkpoint", result)
    told.close()
    begun = results.load("group.checkpoint")
    assert {tensor.dtype for tensor in begun[0].values()} == {torch.float64}, "no digit is lost"
    *more, last = worker.sums(SHARDS, DOMAINS, JOB_TABLES, begun=begun)
    assert len(more) == 3 - num_shards, "what is kept is not done again"
    assert same(last, whole(worker)) and counted(last) == counted(whole(worker))


def test_checkpoints_come_at_most_so_often(worker, monkeypatch):
    clock = itertools.count(0, 10)  # every look at it is 10 seconds later: three a shard
    monkeypatch.setattr("sere.calibration_jobs.workers.worker.time.monotonic", lambda: float(next(clock)))
    told = [bool(tensors) for tensors, _ in worker.sums(SHARDS * 3, DOMAINS, (), checkpoint_s=60)]
    assert told == [False, True] * 5 + [False, True]


def test_the_sum_of_a_group_is_that_of_its_shards(worker):
    parts = [ShardSums.from_result(next(worker.sums([shard], DOMAINS, JOB_TABLES))) for shard in SHARDS]
    found = ShardSums.from_result(whole(worker))
    for key, tensor in found.sums.items():
        of_parts = sum(part.sums[key] for part in parts if key in part.sums)
        torch.testing.assert_close(tensor, of_parts, atol=0, rtol=1e-12)
    for key, tensor in found.tables.items():
        values = torch.stack([part.tables[key] for part in parts])
        of_parts = values.amax(0) if key.table == "protected" else values.double().sum(0).float()
        torch.testing.assert_close(tensor, of_parts, atol=1e-5, rtol=1e-5)


def test_sums_that_are_not_finite_name_layer_and_dtype(worker, monkeypatch):
    monkeypatch.setattr("sere.calibration_jobs.metrics.cosine.CosineMetric._sum", lambda self, outputs: self.sums + math.nan)
    with pytest.raises(ConfigError, match=r"layer 0 are not finite in float32: try dtype"):
        list(worker.sums(SHARDS, DOMAINS))
