"""What a job's results take: the disk they are kept on, how many there are, and how often a worker sends what it has."""

import shutil
from types import SimpleNamespace

import pytest

from sere.calibration_jobs.shards import Shard, make_groups
from sere.calibration_jobs.workers.room import (
    ResultSizes,
    checkpoint_interval,
    most_groups,
    refuse_full_disk,
    result_sizes,
)
from sere.conf.errors import ConfigError
from sere.conf.schema import CalibrateConfig
from sere.pipeline.runtime.storage import Storage

SIZES = ResultSizes(group=1000, checkpoint=1500, directions=0)
GROUPS = make_groups([Shard(index, ()) for index in range(100)], 8)


def test_sizes_of_a_large_model():
    """94 layers of 128 experts: 37 MB, 185 with four domains, and with all tables 1.3 GB."""
    model = SimpleNamespace(layers=range(94), num_experts=128, hidden_size=4096)
    config = CalibrateConfig(model="m", data="d", output="o")
    plain = result_sizes(config, model, tables=(), num_domains=1)
    assert plain.group == plain.checkpoint == 94 * 3 * 8 * 128**2 == 36_962_304 and plain.directions == 0
    assert result_sizes(config, model, tables=(), num_domains=4).group == 5 * plain.group
    whole = result_sizes(config, model, tables=config.tables, num_domains=1)
    assert 1.2e9 < whole.group < 1.4e9 and whole.checkpoint - plain.group == 2 * (whole.group - plain.group)
    assert whole.directions == 94 * 4 * 4096 * (128 + 128 * 8)


def test_groups_are_few_unless_their_results_are_small():
    assert most_groups(37_000_000) == most_groups(1_300_000_000) == 64
    assert most_groups(1_000_000) == 2000 and most_groups(0) > 10**6


def test_the_driver_gets_a_bounded_share_of_checkpoints():
    assert checkpoint_interval(37_000_000, 8) == 300
    assert checkpoint_interval(2_600_000_000, 8) == pytest.approx(416)


@pytest.fixture
def fits(tmp_path, monkeypatch):
    """Whether a job is let begin with so many bytes free."""

    def ask(free: int, groups=GROUPS, sizes=SIZES, num_workers: int = 1) -> bool:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        try:
            refuse_full_disk(Storage(str(tmp_path)), groups, sizes, num_workers=num_workers)
        except ConfigError:
            return False
        return True

    return ask


def assert_needs(fits, needed: int, **options) -> None:
    assert fits(needed, **options) and not fits(needed - 1, **options)


def test_results_and_a_checkpoint_for_each_worker_are_counted(fits, tmp_path):
    assert [len(group.shards) for group in GROUPS] == [1, 1, 1, 1, 2, 2, 46, 46]
    # One more: a checkpoint is written beside the one whose place it takes.
    assert_needs(fits, 8 * 1000 + 2 * 1500)
    assert_needs(fits, 8 * 1000 + 5 * 1500, num_workers=20)
    assert_needs(fits, 8 * 1000 + 2 * 1500 + 77, sizes=ResultSizes(group=1000, checkpoint=1500, directions=77))
    assert_needs(fits, 100 * 1000, groups=make_groups([Shard(index, ()) for index in range(100)], None), num_workers=20)


def test_what_is_there_is_not_counted_again(fits, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    for name in (GROUPS[0].name, GROUPS[7].name, f"{GROUPS[6].name}.checkpoint", "directions"):
        (folder / f"{name}.safetensors").touch()
    sizes = ResultSizes(group=1000, checkpoint=1500, directions=77)
    assert_needs(fits, 6 * 1000 + 1500, sizes=sizes)
    assert_needs(fits, 6 * 1000 + 3 * 1500, sizes=sizes, num_workers=3)
    for group in GROUPS:
        (folder / f"{group.name}.safetensors").touch()
    assert fits(0, sizes=sizes)
