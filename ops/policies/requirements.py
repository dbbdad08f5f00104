"""Whether an artifact has what a configuration's policies need, in every layer: asked before engines start."""

from sere.conf.errors import ConfigError
from sere.conf.schema import RerouteConfig
from sere.ops.policies.compensation import refuse_rank
from sere.ops.similarity import SimilarityArtifact


def check_artifact(config: RerouteConfig, artifact: SimilarityArtifact) -> None:
    """Refuse an artifact that lacks something that a layer's policy needs.

    Args:
        config: The settings, resolved.
        artifact: What `config.similarity` names.

    Raises:
        SimilarityError: if it lacks the metric.
        ConfigError: if it lacks a table, its surrogates are of a lower rank, or settings name a layer that it does not have.
    """
    for layer in config.per_layer:
        if layer not in artifact.layers:
            raise ConfigError(f"per_layer.{layer} names no MoE layer of the model (there are {artifact.layers}): leave it out")
    for layer in artifact.layers:
        rules, known = config.rules(layer), artifact.layer_tables(layer)
        for name in rules.tables():
            if name == rules.targets.metric:
                artifact.matrix(layer, name)
            if name not in known:
                raise ConfigError(
                    f"policy {config.policy!r} needs {name}, which the artifact {config.similarity} lacks: calibrate the model "
                    "again with `sere calibrate`, which makes all tables, or choose another policy"
                )
        if rules.compensation.rank:
            try:
                refuse_rank(rules.compensation.rank, known)
            except ConfigError as error:
                raise ConfigError(f"per_layer.{layer}: {error}" if layer in config.per_layer else str(error)) from None
