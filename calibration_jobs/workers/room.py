"""How large the results of groups get, what follows for their number, and whether the disk holds them: found out before any
work, not after a night of it."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from sere.calibration_jobs.identity import RESULTS
from sere.calibration_jobs.metrics import METRIC_CLASSES
from sere.calibration_jobs.shards import Group
from sere.calibration_jobs.tables.beta import NUM_BINS
from sere.calibration_jobs.tables.surrogates import num_output_directions
from sere.calibration_jobs.workers.model import MoeFacts
from sere.calibration_jobs.workers.results import file_of
from sere.calibration_jobs.workers.task import DIRECTIONS, checkpoint_of
from sere.conf.errors import ConfigError
from sere.conf.schema import CalibrateConfig
from sere.pipeline.runtime.storage import Storage

_GROUPS, _GROUPS_BYTES = 64, 2 * 10**9
_CHECKPOINT_S, _CHECKPOINT_BYTES_PER_S = 300.0, 50e6


@dataclass(frozen=True, kw_only=True)
class ResultSizes:
    """Bytes of the files that a job keeps until its end; `result_sizes` knows them before."""

    group: int
    """Of one group's sums: of similarities in float64, for each domain and for all, of tables in float32."""
    checkpoint: int
    """All in float64."""
    directions: int
    """On which a wide model's surrogates see inputs and outputs, float32; 0 if there are none."""


def result_sizes(config: CalibrateConfig, model: MoeFacts, *, tables: tuple[str, ...], num_domains: int) -> ResultSizes:
    """How large results get, by the size of the model's layers and what is made of them."""
    num_layers, num_experts, hidden_size = len(model.layers), model.num_experts, model.hidden_size
    num_metrics = sum(metric in METRIC_CLASSES for metric in config.metrics)
    similarities = num_experts**2 * num_metrics * (1 + (num_domains if num_domains > 1 else 0))
    is_wide = hidden_size > config.surrogate_directions
    width = min(hidden_size, config.surrogate_directions)
    seen = num_output_directions(config.surrogate_rank) if is_wide else hidden_size
    numbers = {
        "beta": NUM_BINS,
        "means": num_experts * hidden_size,
        "folds": 3 * num_experts**2,
        "surrogates": num_experts * ((width + 1) * (width + 1 + seen) + hidden_size),
    }
    of_tables = sum(numbers.get(table, num_experts) for table in tables)
    directions = (width + num_experts * seen) * hidden_size if is_wide and "surrogates" in tables else 0
    return ResultSizes(
        group=num_layers * (8 * similarities + 4 * of_tables),
        checkpoint=num_layers * 8 * (similarities + of_tables),
        directions=num_layers * 4 * directions,
    )


def most_groups(num_bytes: int) -> int:
    """In how many groups a job's shards are summed up at most: 64, or as many as have 2 GB of results.

    Of 64, up to 32 workers have work nearly to the end. Small models may have more workers, but their results are small, too.

    Args:
        num_bytes: Of one group's result.
    """
    return max(_GROUPS, _GROUPS_BYTES // max(1, num_bytes))


def checkpoint_interval(num_bytes: int, num_workers: int) -> float:
    """Seconds between a worker's checkpoints: five minutes, or more where the driver would get over 50 MB of them a second.

    Args:
        num_bytes: Of one checkpoint.
        num_workers: That send them.
    """
    return max(_CHECKPOINT_S, num_workers * num_bytes / _CHECKPOINT_BYTES_PER_S)


def refuse_full_disk(storage: Storage, groups: Sequence[Group], sizes: ResultSizes, *, num_workers: int) -> None:
    """Refuse a job whose results and checkpoints do not fit the disk they are kept on, beside those that are there.

    Args:
        storage: The job's folder, on a local disk.
        groups: All of the job.
        sizes: Of its files.
        num_workers: Groups that are worked on at the same time: each has a checkpoint until its result is there.

    Raises:
        ConfigError: if there is too little space, with the remedies.
    """
    there = storage.sizes(RESULTS)
    left = [group for group in groups if file_of(group.name) not in there]
    num_long = sum(len(group.shards) > 1 for group in left)
    num_kept = sum(file_of(checkpoint_of(group.name)) in there for group in left)
    # One that takes another's place is written beside it first.
    num_checkpoints = max(0, min(num_long, num_workers) - num_kept) + 1 if num_long else 0
    needed = sizes.group * len(left) + sizes.checkpoint * num_checkpoints
    needed += sizes.directions if file_of(DIRECTIONS) not in there else 0
    free = shutil.disk_usage(storage.path).free
    if needed > free:
        raise ConfigError(
            f"the results of {len(left)} groups of shards and {num_checkpoints} checkpoints take {needed / 1e9:,.1f} GB in "
            f"{storage.shown}, which has {free / 1e9:,.1f} GB left: take fewer surrogate_directions, leave surrogates out of "
            "tables, make fewer, larger shards (shard_rows), or choose another output"
        )
