"""The matrices that the registry's champion has, to be judged beside the new ones."""

from dataclasses import dataclass

from torch import Tensor

from sere.calibration_jobs.facts import JobFacts
from sere.conf.errors import ConfigError
from sere.pipeline.tracking.artifacts import load_artifact
from sere.pipeline.tracking.registry import CHAMPION, REGISTRY_SCHEME, alias_version


@dataclass(frozen=True)
class Champion:
    """The version that a new one has to beat."""

    version: str
    matrices: dict[int, Tensor]
    """Of the reference metric, float32 `[num_experts, num_experts]` by layer."""


def read_champion(job: JobFacts) -> Champion | None:
    """The champion; None if there is none, if it is not asked for, or if this very run made it.

    Raises:
        ConfigError: if it is of another model, or may be, or lacks the metric that is compared.
    """
    config = job.config
    if config.promote_if == "never" or not config.tracking.uri:
        return None
    version = alias_version(config.tracking.uri, job.name, CHAMPION, not_from=job.run_id)
    if version is None:
        return None
    artifact = load_artifact(f"{REGISTRY_SCHEME}{job.name}/{version}", uri=config.tracking.uri)
    artifact.check_model(num_experts=job.model.num_experts, model=None)
    if not artifact.model.is_same(job.model.identity):
        raise ConfigError(
            f"champion version {version} of {job.name} is not, or not known to be, of this model's weights ({artifact.model}; "
            f"this model: {job.model.identity}): choose another registered_model, or set promote_if=never and promote by hand"
        )
    metric = config.judge.metric
    if metric not in artifact.metrics:
        raise ConfigError(
            f"champion version {version} of {job.name} has no metric {metric!r} (it has {', '.join(artifact.metrics)}): choose "
            "one of them as judge.metric, or set promote_if=never and promote by hand"
        )
    return Champion(version, {layer: artifact.matrix(layer, metric) for layer in artifact.layers})
