"""The calibration job: Ray workers turn shards of text into sums, the sums become matrices, the matrices are judged and kept.

Every finished task is on disk before the next step counts on it; the same command continues where a killed one stopped.
"""

import dataclasses
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere.calibration_jobs.judge.agreement import agreement
from sere.calibration_jobs.judge.assess import assess
from sere.calibration_jobs.metrics.merge import ALL, InOrder, MergedSums
from sere.calibration_jobs.publish.record import record, summary
from sere.calibration_jobs.shards import Plan, make_plan, tokenize
from sere.calibration_jobs.texts import read_rows
from sere.calibration_jobs.workers.model import ModelFacts, inspect_model, load_tokenizer
from sere.calibration_jobs.workers.pool import Task
from sere.calibration_jobs.workers.results import JobFolder, Result, digest_of, write_json
from sere.calibration_jobs.workers.tasks import TaskRunner
from sere.conf.errors import ConfigError
from sere.conf.schema import CalibrateConfig
from sere.ops.model_digest import files_digest
from sere.ops.similarity import FILE_NAME, SimilarityArtifact
from sere.pipeline.tracking.tracker import NullTracker, resume, track

# What may differ between a job and its continuation: it changes where and how fast, not what.
_NOT_IDENTITY = (
    "output", "overwrite", "num_workers", "num_cpus_per_worker", "num_gpus_per_worker", "max_memory_gib", "offload_folder",
    "registered_model", "promote_if", "judge", "tracking",
)  # fmt: skip


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


def _calibrate_shards(tasks: TaskRunner, plan: Plan, tracker: NullTracker) -> tuple[MergedSums, list[dict[str, Any]]]:
    """All shards' sums, and how the agreement of the two halves grew with tokens."""
    merged, in_order, growth = MergedSums(), InOrder(plan.shards), []
    by_name = {shard.name: shard for shard in plan.shards}
    done_tokens = 0
    for task, (_, info) in tasks.run([Task(s.name, "sums", (s.rows, plan.domains)) for s in plan.shards], "Calibrating"):
        done_tokens += info["num_tokens"][ALL]
        tracker.log_progress(
            {"progress/tokens": done_tokens, "progress/worker_peak_memory_mib": info["peak_memory_bytes"] / 2**20},
            step=by_name[task.name].index,
        )
        for shard in in_order.arrive(by_name[task.name]):
            sums, details = tasks.stored(shard.name) or _lost(shard.name)
            merged.add(shard, sums, details["num_tokens"])
            # At powers of two, and at the end.
            if merged.num_shards & (merged.num_shards - 1) == 0 or merged.num_shards == len(plan.shards):
                halves = merged.matrices(half=0), merged.matrices(half=1)
                if all(halves):
                    metrics = list(dict.fromkeys(name for _, name in halves[0]))
                    figures = agreement(*halves, metrics)
                    growth.append({"num_tokens": merged.num_tokens(), "metrics": figures})
                    for metric, values in figures.items():
                        found = {f"reliability/{metric}_{figure}": values[figure] for figure in ("spearman", "decision")}
                        tracker.log_metrics(found, step=merged.num_tokens())
    return merged, growth


def _lost(name: str) -> Result:
    raise ConfigError(f"the result of {name} was damaged on disk right after it was written: check the disk, then run again")


def _manifest(
    config: CalibrateConfig, model: ModelFacts, plan: Plan, folder: JobFolder, layers: list[int], num_tokens: int
) -> dict:
    import torch
    import transformers

    return {
        "num_experts": model.num_experts,
        "layers": layers,
        "metrics": list(config.metrics),
        "model": {"name": config.model, "digest": model.digest, "dtype": config.dtype},
        "data": {
            "source": config.data,
            "digest": plan.digest,
            "num_sequences": plan.num_calibration_rows,
            "num_held_out": len(plan.held_out),
            "domains": list(plan.domains),
        },
        "num_tokens": num_tokens,
        "block_tokens": model.block_tokens,
        "config_digest": folder.digest,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


@contextmanager
def _run_of(config: CalibrateConfig, folder: JobFolder, key: str) -> Iterator[NullTracker]:
    """The MLflow run of this job: a new one, or the one an interrupted call began."""
    before = folder.noted("run") or {}
    known = before.get("run_id") if before.get("key") == key else None
    with track(config.tracking, kind="calibrate", default_name="calibrate", run_id=resume(config.tracking, known)) as tracker:
        folder.note("run", {"run_id": tracker.run_id, "key": key})
        yield tracker


def calibrate(config: CalibrateConfig) -> Calibration:
    """Run the job, or what is left of it.

    Raises:
        ConfigError: if the model, the data or the output cannot be used; before any work where that can be known.
    """
    output = Path(config.output)
    if output.name != FILE_NAME:
        raise ConfigError(f"output must be a path ending in {FILE_NAME}, got {config.output}")
    model = inspect_model(config)
    rows, remarks = read_rows(config)
    token_rows, cut = tokenize(config, load_tokenizer(config), rows)
    plan = make_plan(config, token_rows)
    identity = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_IDENTITY}
    identity |= {"model_digest": model.digest, "data_digest": plan.digest, "block_tokens": model.block_tokens}
    identity["held_out_rows"] = config.judge.held_out_rows
    name = config.registered_model or f"sere-{Path(config.model).name}"
    with JobFolder(output.parent / "calibration", identity, overwrite=config.overwrite) as folder:
        # The run and its figures belong to the judging, too; the sums do not.
        key = _key(config, folder, name)
        finished = folder.noted("finished")
        if finished and finished["key"] == key and output.is_file() and files_digest([output]) == finished["file"]:
            return Calibration(output, name, finished["version"], finished["promoted"], was_finished=True)
        _write_remarks(folder.path / "rows.jsonl", [*remarks, *cut])
        with _run_of(config, folder, key) as tracker, TaskRunner(config, model, folder) as tasks:
            tracker.log_config(config)
            tracker.log_params(
                {"model_digest": model.digest, "data_digest": plan.digest, "used_block_tokens": model.block_tokens}
            )
            tracker.log_dataset(source=config.data, digest=plan.digest, num_rows=len(token_rows), context="calibration")
            skipped = sum(remark.remark.startswith("skipped") for remark in (*remarks, *cut))
            tracker.log_metrics(
                {
                    "num_sequences": plan.num_calibration_rows,
                    "num_held_out": len(plan.held_out),
                    "num_skipped_rows": skipped,
                    "num_cut_rows": len(remarks) + len(cut) - skipped,
                }
            )
            merged, growth = None, []
            matrices, num_tokens = {}, 0
            if set(config.metrics) != {"weights"}:
                merged, growth = _calibrate_shards(tasks, plan, tracker)
                matrices, num_tokens = merged.matrices(), merged.num_tokens()
            if "weights" in config.metrics:
                ((_, (found, _)),) = tasks.run([Task("weights", "weights", ())], "Comparing weights")
                matrices |= {(int(layer), "weights"): matrix for layer, matrix in found.items()}
            quality = assess(config, model, tasks, plan, merged, matrices, growth, key, name, tracker.run_id)
            layers = sorted({layer for layer, _ in matrices})
            manifest = _manifest(config, model, plan, folder, layers, num_tokens) | {"quality": summary(quality)}
            artifact = SimilarityArtifact(matrices, manifest)
            write_json(folder.path / "quality.json", quality)
            artifact.save(output)
            tracker.log_metrics({"num_tokens": num_tokens, "num_replaced_workers": tasks.num_replaced})
            version, promoted = record(tracker, config, name, artifact, quality, output, folder.path)
            folder.note("finished", {"key": key, "version": version, "promoted": promoted, "file": files_digest([output])})
            return Calibration(output, name, version, promoted, was_finished=False, num_done=tasks.num_done)


def _key(config: CalibrateConfig, folder: JobFolder, name: str) -> str:
    """What one MLflow run and one version belong to: the sums, how they are judged, and where that is recorded."""
    judge, tracking = dataclasses.asdict(config.judge), config.tracking
    values = {"job": folder.digest, "judge": judge, "name": name, "promote_if": config.promote_if}
    return digest_of(values | {"uri": tracking.uri, "experiment": tracking.experiment})[:12]


def _write_remarks(path: Path, remarks: Sequence[Any]) -> None:
    import json

    aside = path.with_name(f".{path.name}")
    aside.write_text("".join(json.dumps(dataclasses.asdict(remark)) + "\n" for remark in remarks))
    aside.replace(path)
