"""The calibration job: Ray workers turn shards of text into sums, the sums become matrices, the matrices are judged and kept.

Every finished task is on disk before the next step counts on it; the same command continues where a killed one stopped.
"""

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere.calibration_jobs.facts import JobFacts, Similarities, tables_of
from sere.calibration_jobs.identity import CALIBRATE, FINISHED, MAX_GROUPS, QUALITY, REMARKS, RESULTS, RUN, job_settings
from sere.calibration_jobs.judge.agreement import agreement
from sere.calibration_jobs.judge.assess import assess
from sere.calibration_jobs.metrics.base import ShardSums
from sere.calibration_jobs.metrics.merge import InOrder, MergedSums
from sere.calibration_jobs.publish.manifest import manifest_of
from sere.calibration_jobs.publish.record import record
from sere.calibration_jobs.shards import Group, make_groups, make_plan, tokenize
from sere.calibration_jobs.tables.base import table_specs
from sere.calibration_jobs.texts import RowRemark, read_rows
from sere.calibration_jobs.workers.model import inspect_model, load_tokenizer
from sere.calibration_jobs.workers.results import Results
from sere.calibration_jobs.workers.room import checkpoint_interval, most_groups, refuse_full_disk, result_sizes
from sere.calibration_jobs.workers.runner import TaskRunner
from sere.calibration_jobs.workers.task import DIRECTIONS, LayerTensors, Task
from sere.conf.errors import ConfigError
from sere.conf.nested import digest_of
from sere.conf.schema import CalibrateConfig
from sere.conf.whole_file import remove_unfinished
from sere.ops.model_digest import files_digest
from sere.ops.similarity import FILE_NAME, SimilarityArtifact
from sere.pipeline.runtime.job_folder import JobFolder
from sere.pipeline.runtime.storage import Storage
from sere.pipeline.tracking.tracker import NullTracker, resume, track

_log = logging.getLogger(__name__)
# What directions are found on; one forward pass.
_SAMPLE_TOKENS = 4096


@dataclass(frozen=True)
class Calibration:
    """What a job left."""

    file: Path
    name: str
    """Registered model."""
    version: str | None
    """Version in the MLflow registry; None without tracking."""
    promoted: bool
    was_finished: bool
    """Nothing was to be done."""
    num_done: int = 0
    """Tasks this call ran; what an earlier one had finished is not among them."""


def calibrate(config: CalibrateConfig, *, ray_address: str | None = None) -> Calibration:
    """Run the job, or what is left of it.

    Args:
        config: The settings.
        ray_address: The Ray cluster to join; None: a local one is started.

    Raises:
        ConfigError: if the model, the data or the output cannot be used; before any work where that can be known.
    """
    output = Path(config.output)
    if output.name != FILE_NAME:
        raise ConfigError(f"output must be a path ending in {FILE_NAME}, got {config.output}")
    model = inspect_model(config)
    # From here on it is the same commit for all who load the model.
    config = dataclasses.replace(config, model_revision=model.commit)
    rows, remarks = read_rows(config)
    token_rows, cut = tokenize(config, load_tokenizer(config), rows)
    remarks += cut
    plan = make_plan(config, token_rows)
    asked = result_sizes(config, model, tables=config.tables, num_domains=len(plan.domains))
    settings = job_settings(
        config,
        model_digest=model.job_digest,
        data_digest=plan.digest,
        block_tokens=model.block_tokens,
        max_groups=most_groups(asked.group),
    )
    earlier = {"model_digest": model.earlier_digests}
    storage = Storage(str(output.parent / "calibration"))
    name = config.registered_model or f"sere-{Path(config.model).name}"
    with JobFolder(storage, CALIBRATE, settings, overwrite=config.overwrite, earlier=earlier) as folder:
        remove_unfinished(Path(storage.locate(RESULTS)))
        if "tables" in folder.kept:
            _log.warning("%s was begun before there were tables: it will have none. To make them: overwrite=true", output)
        # The run and its figures belong to the judging, too; the sums do not.
        key = _key(config, folder, name)
        finished = storage.get_json(FINISHED)
        if finished and finished["key"] == key and output.is_file() and files_digest([output]) == finished["file"]:
            return Calibration(output, name, finished["version"], finished["promoted"], was_finished=True)
        groups = make_groups(plan.shards, folder.kept.get(MAX_GROUPS, settings[MAX_GROUPS]))
        sizes = result_sizes(config, model, tables=tables_of(config, folder), num_domains=len(plan.domains))
        refuse_full_disk(storage, groups, sizes, num_workers=config.num_workers)
        storage.put(REMARKS, "".join(json.dumps(dataclasses.asdict(remark)) + "\n" for remark in remarks).encode())
        runner = TaskRunner(config, Results(storage, folder.digest), block_tokens=model.block_tokens, ray_address=ray_address)
        with _run_of(config, storage, key) as tracker, runner as tasks:
            job = JobFacts(
                config=config,
                model=model,
                plan=plan,
                groups=groups,
                sizes=sizes,
                folder=folder,
                name=name,
                key=key,
                run_id=tracker.run_id,
            )
            _log_start(tracker, job, remarks)
            job = _with_digest(job, tasks)
            found = _similarities(job, tasks, tracker)
            quality = assess(job, tasks, found)
            artifact = SimilarityArtifact(found.matrices, manifest_of(job, found, quality), found.tables)
            storage.put_json(QUALITY, quality)
            artifact.save(output)
            tracker.log_metrics({"num_tokens": found.num_tokens, "num_replaced_workers": tasks.num_replaced})
            version, promoted = record(tracker, job, artifact, quality)
            storage.put_json(FINISHED, {"key": key, "version": version, "promoted": promoted, "file": files_digest([output])})
            return Calibration(output, name, version, promoted, was_finished=False, num_done=tasks.num_done)


def _key(config: CalibrateConfig, folder: JobFolder, name: str) -> str:
    """What one MLflow run and one version belong to: the sums, how they are judged, and where that is recorded."""
    judge, tracking = dataclasses.asdict(config.judge), config.tracking
    values = {"job": folder.digest, "judge": judge, "name": name, "promote_if": config.promote_if}
    return digest_of(values | {"uri": tracking.uri, "experiment": tracking.experiment})[:12]


@contextmanager
def _run_of(config: CalibrateConfig, storage: Storage, key: str) -> Iterator[NullTracker]:
    """The MLflow run of this job: a new one, or the one an interrupted call began."""
    before = storage.get_json(RUN) or {}
    known = before.get("run_id") if before.get("key") == key else None
    with track(config.tracking, kind="calibrate", default_name="calibrate", run_id=resume(config.tracking, known)) as tracker:
        storage.put_json(RUN, {"run_id": tracker.run_id, "key": key})
        yield tracker


def _log_start(tracker: NullTracker, job: JobFacts, remarks: Sequence[RowRemark]) -> None:
    """The settings and the data, before any work."""
    plan = job.plan
    num_rows = plan.num_calibration_rows + len(plan.held_out)
    num_skipped = sum(remark.is_skipped for remark in remarks)
    tracker.log_config(job.config)
    tracker.log_params(
        {"model_digest": job.model.job_digest, "data_digest": plan.digest, "used_block_tokens": job.model.block_tokens}
    )
    tracker.log_dataset(source=job.config.data, digest=plan.digest, num_rows=num_rows, context="calibration")
    tracker.log_metrics(
        {
            "num_sequences": plan.num_calibration_rows,
            "num_held_out": len(plan.held_out),
            "num_skipped_rows": num_skipped,
            "num_cut_rows": len(remarks) - num_skipped,
        }
    )


def _with_digest(job: JobFacts, tasks: TaskRunner) -> JobFacts:
    """The job with the digest of a hub model's files: where they are not here, a worker that has loaded them tells it."""
    if job.model.digest is not None:
        return job
    ((_, (_, told)),) = tasks.run([Task("model", "identity", ())], "Loading the model")
    return dataclasses.replace(job, model=dataclasses.replace(job.model, digest=told["digest"]))


def _similarities(job: JobFacts, tasks: TaskRunner, tracker: NullTracker) -> Similarities:
    """Everything that is calibrated: from the shards, and from the weights."""
    metrics = job.config.metrics
    found = Similarities({})
    if set(metrics) != {"weights"} or tables_of(job.config, job.folder):
        found = _calibrate_shards(job, tasks, tracker)
    if "weights" in metrics:
        ((_, result),) = tasks.run([Task("weights", "weights", ())], "Comparing weights")
        by_layer = LayerTensors.from_result(result).by_layer
        found.matrices.update({(layer, "weights"): matrix for layer, matrix in by_layer.items()})
    return found


def _directions(job: JobFacts, tasks: TaskRunner) -> Mapping[str, Any] | None:
    """On which directions surrogates see inputs and outputs; None: as they are."""
    if "surrogates" not in tables_of(job.config, job.folder) or job.model.hidden_size <= job.config.surrogate_directions:
        return None
    rows = [row for shard in job.plan.shards for row in shard.rows]
    ends = itertools.accumulate(len(row.tokens) for row in rows)
    sample = tuple(row for row, end in zip(rows, ends, strict=True) if end <= _SAMPLE_TOKENS) or rows[:1]
    first = Task(DIRECTIONS, "directions", (sample,))
    ((_, (found, _)),) = tasks.run([first], "Finding directions")
    return found


def _calibrate_shards(job: JobFacts, tasks: TaskRunner, tracker: NullTracker) -> Similarities:
    """All groups' sums, merged in order."""
    plan, tables, directions = job.plan, tables_of(job.config, job.folder), _directions(job, tasks)
    specs = table_specs(dict.fromkeys(job.model.layers, job.model.num_experts), job.config.surrogate_rank, directions)
    merged, growth, next_growth = MergedSums(specs), list[dict[str, Any]](), 1
    shared = tasks.share(directions) if directions is not None else None
    interval = checkpoint_interval(job.sizes.checkpoint, job.config.num_workers)
    arguments = plan.domains, tables, shared, interval
    work = [
        Task(
            group.name,
            "sums",
            (tuple(shard.rows for shard in group.shards), *arguments),
            shards=tuple(shard.name for shard in group.shards),
        )
        for group in job.groups
    ]
    by_name = {group.name: group for group in job.groups}
    in_order = InOrder(job.groups, lambda group: _read_again(group, tasks))
    so_far: dict[str, ShardSums] = {}
    for task, result in tasks.run(work, "Calibrating"):
        found = ShardSums.from_result(result)
        so_far[task.name] = dataclasses.replace(found, sums={}, tables={})
        tracker.log_progress(
            {
                "progress/tokens": sum(sums.num_tokens[None] for sums in so_far.values()),
                "progress/worker_peak_memory_mib": found.peak_memory_bytes / 2**20,
            },
            step=sum(sums.num_shards for sums in so_far.values()),
        )
        if found.num_shards < len(task.shards):
            continue
        for group, sums in in_order.arrive(by_name[task.name], found):
            merged.add(group, sums)
            is_last = merged.num_shards == len(plan.shards)
            # At powers of two, or soon after them, when both halves are equal; and at the end.
            if (group.half and merged.num_shards >= next_growth) or is_last:
                growth += _agreement_of_halves(merged, tracker)
                next_growth = 1 << merged.num_shards.bit_length()
    return Similarities(merged.matrices(), merged, growth, merged.tables(), merged.explained())


def _read_again(group: Group, tasks: TaskRunner) -> ShardSums:
    """A group's sums, which were on disk before."""
    stored = tasks.stored(group.name)
    if stored is None:
        raise ConfigError(
            f"the result of {group.name} was damaged on disk right after it was written: check the disk, then run again"
        )
    return ShardSums.from_result(stored)


def _agreement_of_halves(merged: MergedSums, tracker: NullTracker) -> list[dict[str, Any]]:
    """How far the two halves of the data agree so far; empty while one of them has no tokens."""
    halves = merged.matrices(half=0), merged.matrices(half=1)
    if not all(halves):
        return []
    num_tokens = merged.num_tokens()
    figures = agreement(*halves, list(dict.fromkeys(name for _, name in halves[0])))
    for metric, values in figures.items():
        found = {f"reliability/{metric}_{figure}": values[figure] for figure in ("spearman", "decision")}
        tracker.log_metrics(found, step=num_tokens)
    return [{"num_tokens": num_tokens, "metrics": figures}]
