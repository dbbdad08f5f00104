"""`sere generate`: Ray Data reads the input, Ray actors run vLLM replicas with re-routing, and the parts they write add up.

The order of things: what the job is (model, input, artifact), whose folder it is, what in it is finished, the rest through the
replicas, and at the end the figures of all parts together.
"""

import dataclasses
import logging
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sere.conf.nested import describe_difference, digest_of
from sere.conf.schema import GenerateConfig
from sere.pipeline.data.scan import scan_known
from sere.pipeline.data.source import Source
from sere.pipeline.generate.attempts import read_attempts
from sere.pipeline.generate.columns import check_columns, input_spec, references_of
from sere.pipeline.generate.dispatch.work import Rows
from sere.pipeline.generate.finish import finish, finish_settings
from sere.pipeline.generate.identity import (
    BATCHING,
    GENERATE,
    INPUT,
    MANIFEST,
    SIMILARITY,
    conditions,
    earlier_settings,
    free_settings,
    job_settings,
    kind_of,
)
from sere.pipeline.generate.left import read_batches
from sere.pipeline.generate.monitor import Monitor
from sere.pipeline.generate.parts import Finished, Parts
from sere.pipeline.generate.preflight import (
    check_stats_dir,
    engine_arguments,
    join_cluster,
    prepare_reroute,
    read_facts,
)
from sere.pipeline.generate.record import Session, known_input, next_session, read_manifest, read_sessions, sweep
from sere.pipeline.generate.replica.answers import Answer, answer_table
from sere.pipeline.generate.replica.starter import ReplicaStarter, wanted_room
from sere.pipeline.runtime.job_folder import JobFolder
from sere.pipeline.runtime.older_jobs import settings_then
from sere.pipeline.runtime.storage import Storage
from sere.pipeline.tracking.tracker import NullTracker, resume, track

_log = logging.getLogger(__name__)
_STOP_S, _STOP_INTERRUPTED_S = 120.0, 15.0


@dataclass(frozen=True)
class Summary:
    """What a finished job has to show."""

    output: str
    metrics: dict[str, float]
    was_finished: bool
    """It was finished before; nothing was done now."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What the steps of a job share; `generate` fills it."""

    config: GenerateConfig
    source: Source
    folder: JobFolder
    parts: Parts
    engine_arguments: dict[str, Any]
    model_digest: str
    artifact: dict[str, str]
    on_gpu: bool
    is_ordered: bool
    """It was finished before, with its rows in the input's order."""


def generate(config: GenerateConfig, *, ray_address: str | None = None, parent_run_id: str | None = None) -> Summary:
    """Run the job, or go on with it.

    Args:
        config: The job.
        ray_address: Of the Ray cluster to join; None starts a local Ray, unless one runs in this process.
        parent_run_id: MLflow run below which this one is recorded.

    Raises:
        ConfigError, SimilarityError: if the model, the data, the job's folder or a setting cannot be used, or engines cannot
            start. What was finished stays; the same command goes on with it.
    """
    storage = Storage(config.output, config.storage_options)
    facts = read_facts(config)
    # From here on it is the same commit for all who load the model.
    config = dataclasses.replace(config, model_revision=facts.commit)
    with tempfile.TemporaryDirectory(prefix="sere-") as scratch:
        reroute, artifact = prepare_reroute(config, facts, Path(scratch))
        check_stats_dir(reroute, storage)
        on_gpu = join_cluster(config, ray_address)
        source, known = scan_known(input_spec(config), num_rows=config.num_rows, known=known_input(storage))
        check_columns(config, source.schema)
        settings = job_settings(
            config, model_digest=facts.job_digest, fingerprints=source.fingerprints, artifact=artifact.content
        )
        earlier, free = earlier_settings(facts, source), free_settings(config)
        with JobFolder(storage, kind_of(source), settings, overwrite=config.overwrite, free=free, earlier=earlier) as folder:
            parts = Parts(storage, folder.digest)
            manifest = read_manifest(parts)
            if manifest is not None:
                sweep(parts, manifest)
                is_same = manifest.get("finish", finish_settings(config)) == finish_settings(config)
                if is_same and not (config.retry_errors and manifest["metrics"]["num_errors"]):
                    return Summary(config.output, manifest["metrics"], was_finished=True)
                storage.remove(MANIFEST)
            storage.put_json(INPUT, known)
            if artifact.content:
                storage.put(SIMILARITY, artifact.content)
            job = _Job(
                config=config,
                source=source,
                folder=folder,
                parts=parts,
                engine_arguments=engine_arguments(config, reroute, on_gpu=on_gpu),
                model_digest=facts.job_digest,
                artifact=artifact.facts,
                on_gpu=on_gpu,
                is_ordered=manifest is not None and bool(manifest.get("finish", {}).get("preserve_order")),
            )
            metrics = _run(job, parent_run_id)
    return Summary(config.output, metrics, was_finished=False)


def _run(job: _Job, parent_run_id: str | None) -> dict[str, float]:
    config, source, storage = job.config, job.source, job.folder.storage
    finished = job.parts.scan(errors_count=not config.retry_errors)
    earlier = read_sessions(storage)
    noted = storage.get_json("run.json") or {}
    name = "unmodified" if config.reroute is None else config.reroute.policy
    run_id = resume(config.tracking, noted.get("mlflow_run_id"))
    with track(
        config.tracking,
        kind="generate",
        default_name=name,
        run_id=run_id,
        parent_run_id=parent_run_id,
        system_metrics=True,
    ) as tracker:
        storage.put_json("run.json", {"mlflow_run_id": tracker.run_id})
        if run_id is None:
            tracker.log_config(config)
            commit = {} if source.commit is None else {"data_commit": source.commit}
            tracker.log_params({"model_digest": job.model_digest, **job.artifact, **commit})
            # Runs that were recorded before there were commits are compared with this one by it.
            digest = digest_of({**source.fingerprints, **source.earlier_fingerprints})
            tracker.log_dataset(source=config.data, digest=digest, num_rows=source.num_rows, context="generation")
        is_left = finished.num_rows < source.num_rows
        if is_left:
            _warn_of_mixing(config, earlier, tracker)
            session = Session(next_session(storage), conditions=conditions(config))
            with Monitor(
                config=config,
                num_rows=source.num_rows,
                session=session,
                before=finished,
                earlier=earlier,
                folder=job.folder,
                tracker=tracker,
                wanted=partial(wanted_room, config, on_gpu=job.on_gpu),
            ) as monitor:
                _work(job, finished, monitor)
        return finish(config, source, job.folder, job.parts, tracker, is_ordered=job.is_ordered and not is_left)


def _warn_of_mixing(config: GenerateConfig, earlier: list[Session], tracker: NullTracker) -> None:
    """Say, and record, in what the sessions of this job differ that their answers may depend on."""
    now = conditions(config)
    before = next((session.conditions for session in reversed(earlier) if session.conditions), now)
    before = settings_then(before, now, GENERATE.absent)
    if before == now:
        return
    _log.warning(
        "this job goes on under other conditions, on which answers depend a little: %s", describe_difference(before, now)
    )
    reroutes = config.reroute is not None and config.reroute.policy != "none"
    if reroutes and any(before.get(key) != now.get(key) for key in BATCHING):
        tracker.log_params({"mixed_batch": True})


def _work(job: _Job, finished: Finished, monitor: Monitor) -> None:
    """Run what is left through replicas."""
    from sere.pipeline.generate.dispatch.dispatcher import Dispatcher
    from sere.pipeline.generate.dispatch.remaining import Split, left_of, read

    config, source, parts = job.config, job.source, job.parts
    session = f"s{monitor.session.number:04d}-{job.folder.token}"
    starter = ReplicaStarter(config, job.engine_arguments, parts, source.schema, session=session, on_gpu=job.on_gpu)
    given_up = iter(range(10**6))

    def give_up(rows: Rows, why: str) -> None:
        table = read(rows)
        answers = [(0, row, Answer(error=why)) for row in range(len(table))]
        name = f"{session}-driver-{next(given_up):06d}"
        references = references_of(config, source.schema)
        parts.write(name, answer_table(answers, {0: table}, source.schema, config.id_column, references))

    dispatcher = Dispatcher(
        starter.start,
        starter.end,
        num_replicas=config.engine.max_replicas or config.engine.num_replicas,
        concurrent_batches=config.concurrent_batches,
        max_retries=config.max_retries,
        stall_timeout_s=config.stall_timeout_s,
        left_of=partial(left_of, parts),
        give_up=give_up,
        split=Split(read_attempts(parts.storage, finished.rows), max_retries=config.max_retries),
    )
    patience = _STOP_INTERRUPTED_S
    try:
        for _ in dispatcher.run(read_batches(source, finished, config)):
            monitor.update(dispatcher)
        monitor.update(dispatcher)
        patience = _STOP_S
    finally:
        # Also when interrupted: what replicas have finished is kept.
        dispatcher.close(timeout_s=patience)
        monitor.update(dispatcher, final=True)
