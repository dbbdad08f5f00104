"""Quality lost by a configuration, with its uncertainty: a bootstrap paired over the rows both runs answered."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sere.conf.errors import ConfigError
from sere.pipeline.evaluate.scorers import SCORES_FILE

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

_KEYS = ["source_file", "source_row"]
_NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Loss:
    """Mean hit of the unmodified model minus that of the configuration; positive is worse.

    Without scores of the single rows there is only the point: no interval, and no number of rows.
    """

    point: float
    low: float | None = None
    high: float | None = None
    num_rows: int | None = None


def paired_loss(
    baseline: "np.ndarray",
    changed: "np.ndarray",
    *,
    num_resamples: int = _NUM_RESAMPLES,
    seed: int = 0,
) -> Loss:
    """Loss with a 95% percentile bootstrap interval over rows.

    Rows are drawn with replacement and without strata: tasks keep their shares only on average. A row's difference is -1, 0
    or 1, so a resample's mean depends only on how often each was drawn, which is multinomial; drawing these counts is the
    same as drawing rows, whatever the number of rows. The interval speaks of other rows like these, not of other runs; where
    no answer changed at all it is [0, 0], however few the rows.

    Args:
        baseline: bool `[num_rows]`, hits of the unmodified model; at least one.
        changed: bool `[num_rows]`, hits of the configuration on the same rows.
        num_resamples: Bootstrap samples.
        seed: The interval is the same for the same hits and seed; exchanging the two arrays negates it.
    """
    import numpy as np

    num_rows = len(baseline)
    worse, better = int((baseline & ~changed).sum()), int((changed & ~baseline).sum())
    # The larger count comes first, so that exchanging the arrays draws the same numbers.
    counts = np.array([max(worse, better), min(worse, better), num_rows - worse - better])
    drawn = np.random.default_rng(seed).multinomial(num_rows, counts / num_rows, size=num_resamples)
    means = (drawn[:, 0] - drawn[:, 1]) / num_rows
    if worse < better:
        means = -means
    elif worse == better:
        means = np.concatenate([means, -means])
    low, high = np.quantile(means, [0.025, 0.975])
    return Loss((worse - better) / num_rows, float(low), float(high), num_rows)


def read_scores(file: Path) -> "pa.Table":
    """Rows with a reference: their keys and `hit`, each key once.

    Raises:
        ConfigError: if the file is not of that form.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        schema = pa.schema([("source_file", pa.string()), ("source_row", pa.int64()), ("hit", pa.bool_())])
        table = pq.read_table(file, columns=schema.names).select(schema.names).cast(schema)
        table = table.filter(pc.is_valid(table["hit"]))
        # Not with threads: only then does "last" mean the row written last.
        return table.group_by(_KEYS, use_threads=False).aggregate([("hit", "last")]).rename_columns([*_KEYS, "hit"])
    except (OSError, pa.ArrowException, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{SCORES_FILE} cannot be read ({reason}): run the configuration again") from error


def loss_of(baseline: "pa.Table", changed: "pa.Table") -> Loss | None:
    """Loss on the rows that both tables of `read_scores` have; None if they share none."""
    joined = baseline.join(changed, keys=_KEYS, join_type="inner", right_suffix="_changed")
    if not joined.num_rows:
        return None
    return paired_loss(*(joined[name].combine_chunks().to_numpy(zero_copy_only=False) for name in ("hit", "hit_changed")))
