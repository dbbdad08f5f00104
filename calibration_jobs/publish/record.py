"""What a finished calibration leaves in MLflow: figures, pictures, files, a version, and who is champion."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sere.calibration_jobs.facts import JobFacts
from sere.calibration_jobs.identity import QUALITY, REMARKS
from sere.calibration_jobs.judge.candidates import CHAMPION as OF_CHAMPION
from sere.calibration_jobs.publish.numbers import layer_metrics, overall_metrics, reference_errors
from sere.calibration_jobs.publish.pictures import all_pictures
from sere.pipeline.tracking.registry import CANDIDATE, CHAMPION
from sere.pipeline.tracking.tracker import NullTracker

if TYPE_CHECKING:
    from sere.ops.similarity import SimilarityArtifact


def record(
    tracker: NullTracker, job: JobFacts, artifact: "SimilarityArtifact", quality: dict[str, Any]
) -> tuple[str | None, bool]:
    """Figures, pictures, files and a version to MLflow. Returns the version, and whether it became the champion."""
    for layer in artifact.layers:
        tracker.log_metrics(layer_metrics(artifact, quality, layer), step=layer)
    tracker.log_metrics(overall_metrics(quality))
    for path, figure in all_pictures(artifact, quality):
        tracker.log_figure(figure, path)
    for extra in (QUALITY, REMARKS):
        tracker.log_file(Path(job.folder.storage.locate(extra)))
    config, manifest, errors = job.config, artifact.manifest, reference_errors(quality)
    tags = {
        "model": config.model,
        "model_digest": str(manifest["model"]["digest"]),
        "data_digest": manifest["data"]["digest"],
        "num_tokens": str(manifest["num_tokens"]),
        "metrics": ",".join(artifact.metrics),
        **{f"held_out_error.{metric}": f"{error:.6g}" for metric, error in errors.items()},
    }
    if job.model.commit is not None:
        tags["model_commit"] = job.model.commit
    version = tracker.register_artifact(job.file, name=job.name, alias=CANDIDATE, tags=tags)
    if version is None or config.promote_if == "never":
        return version, False
    better = OF_CHAMPION not in errors or errors[config.judge.metric] < errors[OF_CHAMPION]
    if better:
        tracker.set_alias(job.name, CHAMPION, version)
    return version, better
