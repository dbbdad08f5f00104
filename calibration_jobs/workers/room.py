"""How large the results of shards get, and whether the disk holds them: found out before any work, not after a night of it."""

import shutil

from sere.calibration_jobs.metrics import METRIC_CLASSES
from sere.calibration_jobs.tables.beta import NUM_BINS
from sere.calibration_jobs.tables.surrogates import num_output_directions
from sere.calibration_jobs.workers.model import MoeFacts
from sere.conf.errors import ConfigError
from sere.conf.schema import CalibrateConfig
from sere.pipeline.runtime.storage import Storage


def result_bytes(config: CalibrateConfig, model: MoeFacts, *, tables: tuple[str, ...], num_domains: int) -> int:
    """Bytes of one shard's result: similarity sums in float64 for each domain and for all, tables' sums in float32."""
    num_experts, hidden_size = model.num_experts, model.hidden_size
    num_metrics = sum(metric in METRIC_CLASSES for metric in config.metrics)
    similarities = 8 * num_experts**2 * num_metrics * (1 + (num_domains if num_domains > 1 else 0))
    width = min(hidden_size, config.surrogate_directions) + 1
    seen = hidden_size if hidden_size < width else num_output_directions(config.surrogate_rank)
    numbers = {
        "beta": NUM_BINS,
        "means": num_experts * hidden_size,
        "folds": 3 * num_experts**2,
        "surrogates": num_experts * (width**2 + width * seen + hidden_size),
    }
    return len(model.layers) * (similarities + 4 * sum(numbers.get(table, num_experts) for table in tables))


def refuse_full_disk(storage: Storage, num_bytes: int, num_shards: int) -> None:
    """Refuse a job whose results do not fit the disk they are kept on.

    Args:
        storage: The job's folder, on a local disk.
        num_bytes: Of one shard's result.
        num_shards: Shards that have no result yet.

    Raises:
        ConfigError: if there is too little space, with the remedies.
    """
    free, needed = shutil.disk_usage(storage.path).free, num_bytes * num_shards
    if needed > free:
        raise ConfigError(
            f"the results of {num_shards} shards take {needed / 1e9:,.1f} GB in {storage.shown}, which has "
            f"{free / 1e9:,.1f} GB left: make fewer, larger shards (shard_rows), take fewer surrogate_directions, leave "
            "surrogates out of tables, or choose another output"
        )
