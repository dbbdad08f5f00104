"""How a replica re-routes. Imports only the standard library: the vLLM plugin reads it in every engine process."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from sere.conf.errors import ConfigError, unknown_key
from sere.conf.schema.checks import at_least, one_of

METRICS = ("frobenius", "cosine", "cka", "weights")
Metric = Literal["frobenius", "cosine", "cka", "weights"]
PolicyName = Literal["none", "sere", "top_k", "random"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RerouteConfig:
    """How a replica re-routes: vLLM's `additional_config["sere"]`, and the `reroute` section of a generate config."""

    policy: PolicyName = "sere"
    """none: count only; sere: re-route to the most similar primary expert; top_k: drop all but primary_top_k slots; random:
    re-route to a random primary expert."""
    similarity: str | None = None
    """Artifact of `sere calibrate`: a path or, for `sere generate`, models:/NAME@ALIAS from the registry in tracking.uri.
    Needed by policy sere."""
    metric: Metric = "cosine"
    """Which of its matrices: frobenius, cosine, cka or weights."""
    primary_top_k: int = 2
    """Slots per decode row whose experts are primary (the paper's S): 1 to the model's top_k."""
    threshold: float = 0.5
    """Least similarity that re-routes (the paper's rho), 0 to 1. Useful values depend on the metric: look at the off-diagonal
    range in MLflow."""
    phase: Literal["decode", "all"] = "decode"
    """decode: prompts are never touched, their KV cache stays exact; all: prompt rows are re-routed too (the paper)."""
    min_tokens: int = 4
    """Steps with fewer decode rows are left alone: there is nothing to save, and quality suffers most."""
    max_tokens: int = 1024
    """Steps with more rows are left alone."""
    seed: int = 0
    """Seed of policy random."""
    check_model: bool = True
    """Refuse an artifact computed from other weights. false, for a quantised copy of the same model: only layer and expert
    counts must match."""
    stats_dir: str | None = None
    """Folder for the counters, on each replica's node; `sere.ops.engine.counters.read_counters` reads them while the engine
    runs and after it, however it ended. null: nothing is counted, except by `sere generate`, which records their sums
    anyway."""

    def __post_init__(self) -> None:
        one_of(self, "policy", "metric", "phase")
        at_least(self, 1, "primary_top_k", "min_tokens", "max_tokens")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold must be between 0 and 1, got {self.threshold}")
        if self.policy == "sere" and not self.similarity:
            raise ConfigError("policy 'sere' needs similarity: the path of an artifact made by `sere calibrate`")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RerouteConfig":
        """Build from `additional_config["sere"]`; an unknown key or a value of the wrong type is a ConfigError."""
        hints = get_type_hints(cls)
        for key, value in values.items():
            if key not in hints:
                raise unknown_key(key, list(hints), "additional_config['sere']")
            expected = {float: (int, float)}.get(hints[key], hints[key])
            if isinstance(expected, (type, tuple)) and (
                not isinstance(value, expected) or (isinstance(value, bool) and hints[key] is not bool)
            ):
                raise ConfigError(f"{key} must be {hints[key].__name__}, got {value!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
