"""What a calibration job is: the settings that determine its sums, and what it writes into its folder."""

import dataclasses
from typing import Any

from sere.conf.schema import CalibrateConfig
from sere.pipeline.runtime.job_folder import JobKind
from sere.pipeline.runtime.model_facts import CHOOSE_COMMIT
from sere.pipeline.runtime.older_jobs import schema_defaults

FINISHED, RUN, QUALITY, REMARKS = "finished.json", "run.json", "quality.json", "rows.jsonl"
RESULTS = "results"
MAX_GROUPS = "max_groups"
"""The setting that says how shards are grouped (`sere.calibration_jobs.shards.make_groups`); None: each by itself."""
CALIBRATE = JobKind(
    name="calibrate",
    finished=FINISHED,
    files=(RUN, QUALITY, REMARKS),
    results=RESULTS,
    folders={RESULTS: r".+\.safetensors"},
    settings_of_0_1=frozenset({"model_digest", "data_digest", "block_tokens"}),
    # A job of version 0.1 has no sums for tables: it goes on to the similarities it was begun for. Its results, and those of
    # jobs begun a little later, are of one shard each.
    absent={**schema_defaults(CalibrateConfig), "tables": [], MAX_GROUPS: None},
    keeps=frozenset({"tables", "surrogate_rank", "surrogate_directions", MAX_GROUPS}),
    remedies={"model_digest": CHOOSE_COMMIT},
)
# What may differ between a job and its continuation: it changes where and how fast, not what. The digest of the tokens stands
# for how the text was read, and that of the model for its revision.
_NOT_IDENTITY = (
    "output", "overwrite", "num_workers", "num_cpus_per_worker", "num_gpus_per_worker", "max_memory_gib", "offload_folder",
    "registered_model", "promote_if", "judge", "tracking", "data_format", "data_split", "data_revision", "storage_options",
    "model_revision",
)  # fmt: skip


def job_settings(
    config: CalibrateConfig, *, model_digest: str, data_digest: str, block_tokens: int, max_groups: int
) -> dict[str, Any]:
    """All that the sums depend on, as JSON values: of two jobs with equal settings one can go on with the other."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_IDENTITY}
    settings |= {"model_digest": model_digest, "data_digest": data_digest, "block_tokens": block_tokens}
    settings[MAX_GROUPS] = max_groups
    return settings | {"held_out_rows": config.judge.held_out_rows}
