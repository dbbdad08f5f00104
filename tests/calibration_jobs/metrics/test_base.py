"""The names of sums in stored results, which a job begun by an earlier version has too; and what importing the room costs."""

import json
import subprocess
import sys

import pytest
import torch

from sere.calibration_jobs.metrics import METRIC_CLASSES
from sere.calibration_jobs.metrics.base import ShardSums, SumKey
from sere.conf.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (SumKey(0, "cosine"), "0.cosine.all"),
        (SumKey(12, "cka", 0), "12.cka.0"),
        (SumKey(3, "frobenius", 11), "3.frobenius.11"),
    ],
)
def test_names_of_version_0_1(key, name):
    assert key.to_name() == name and SumKey.from_name(name) == key


def test_what_is_stored_is_read():
    sums = {SumKey(1, "cka", domain): torch.rand(2, 2, dtype=torch.float64) for domain in (None, 0, 1)}
    found = ShardSums(sums=sums, num_tokens={None: 7, 0: 4, 1: 3}, num_shards=1, elapsed_s=1.5, peak_memory_bytes=99)
    tensors, info = found.to_result()
    of_version_0_1 = {"num_tokens": {"all": 7, "0": 4, "1": 3}, "elapsed_s": 1.5, "peak_memory_bytes": 99}
    assert info == {**of_version_0_1, "num_shards": 1}
    for values in (info, of_version_0_1):
        assert ShardSums.from_result((tensors, json.loads(json.dumps(values)))) == found


def test_sums_have_one_order_from_a_worker_and_from_a_file():
    sums = {SumKey(layer, name): torch.eye(2) for layer in (2, 10) for name in ("frobenius", "cosine")}
    tensors, info = ShardSums(sums=sums, num_tokens={None: 1}, num_shards=1, elapsed_s=0, peak_memory_bytes=0).to_result()
    orders = [list(ShardSums.from_result((dict(order), info)).sums) for order in (tensors.items(), reversed(tensors.items()))]
    assert orders[0] == orders[1] == sorted(sums, key=SumKey.to_name)


def test_the_table_is_read_only_and_imports_what_it_is_asked_for():
    assert list(METRIC_CLASSES) == ["frobenius", "cosine", "cka"] and len(METRIC_CLASSES) == 3
    assert "weights" not in METRIC_CLASSES
    for name in ("weights", "euclid"):
        with pytest.raises(ConfigError):
            METRIC_CLASSES[name]
    with pytest.raises(TypeError):
        METRIC_CLASSES["cka"] = None
    code = "import sys, sere.calibration_jobs.metrics as m; list(m.METRIC_CLASSES); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
