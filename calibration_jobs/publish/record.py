"""What a finished calibration leaves in MLflow: figures, pictures, files, a version, and who is champion."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sere.calibration_jobs.workers.model import ModelFacts
from sere.conf.errors import ConfigError
from sere.conf.schema import CalibrateConfig
from sere.pipeline.tracking.store import CANDIDATE, CHAMPION, REGISTRY_SCHEME, alias_version, resolve_artifact
from sere.pipeline.tracking.tracker import NullTracker

if TYPE_CHECKING:
    from sere.ops.similarity import SimilarityArtifact


def champion_matrices(
    config: CalibrateConfig, model: ModelFacts, name: str, run_id: str | None
) -> tuple[dict[int, Any] | None, str | None]:
    """The champion's matrices by layer and its version; None if there is none, or this very run made it."""
    import tempfile

    from sere.ops.similarity import SimilarityArtifact

    if config.promote_if == "never" or not config.tracking.uri:
        return None, None
    version = alias_version(config.tracking.uri, name, CHAMPION, not_from=run_id)
    if version is None:
        return None, None
    with tempfile.TemporaryDirectory(prefix="sere-champion-") as scratch:
        uri = f"{REGISTRY_SCHEME}{name}/{version}"
        file = resolve_artifact(uri, tracking_uri=config.tracking.uri, folder=Path(scratch))
        artifact = SimilarityArtifact.load(file)
    artifact.check_model(num_experts=model.num_experts, digest=model.digest)
    metric = config.judge.metric
    if metric not in artifact.metrics:
        raise ConfigError(
            f"champion version {version} of {name} has no metric {metric!r} (it has {', '.join(artifact.metrics)}): choose one "
            "of them as judge.metric, or set promote_if=never and promote by hand"
        )
    return {layer: artifact.matrix(layer, metric) for layer in artifact.layers}, version


def summary(quality: dict[str, Any]) -> dict[str, Any]:
    """What an artifact's manifest keeps: all figures over all layers, none of single layers."""

    def without_layers(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_layers(part) for key, part in value.items() if key != "layers"}
        return [without_layers(part) for part in value] if isinstance(value, list) else value

    return without_layers(quality)


def record(
    tracker: NullTracker,
    config: CalibrateConfig,
    name: str,
    artifact: "SimilarityArtifact",
    quality: dict[str, Any],
    file: Path,
    folder: Path,
) -> tuple[str | None, bool]:
    """Figures, pictures, files and a version to MLflow. Returns the version, and whether it became the champion."""
    from sere.calibration_jobs.publish import figures as pictures
    from sere.calibration_jobs.publish.numbers import layer_metrics, overall_metrics, reference_errors

    for layer in artifact.layers:
        tracker.log_metrics(layer_metrics(artifact, quality, layer), step=layer)
    tracker.log_metrics(overall_metrics(quality))
    for path, figure in pictures.all_figures(artifact, quality):
        tracker.log_figure(figure, path)
    for extra in ("quality.json", "rows.jsonl"):
        tracker.log_file(folder / extra)
    manifest = artifact.manifest
    errors = reference_errors(quality)
    tags = {
        "model": config.model,
        "model_digest": str(manifest["model"]["digest"]),
        "data_digest": manifest["data"]["digest"],
        "num_tokens": str(manifest["num_tokens"]),
        "metrics": ",".join(artifact.metrics),
        **{f"held_out_error.{metric}": f"{error:.6g}" for metric, error in errors.items()},
    }
    version = tracker.register_artifact(file, name=name, alias=CANDIDATE, tags=tags)
    if version is None or config.promote_if == "never":
        return version, False
    better = "champion" not in errors or errors[config.judge.metric] < errors["champion"]
    if better:
        tracker.set_alias(name, CHAMPION, version)
    return version, better
