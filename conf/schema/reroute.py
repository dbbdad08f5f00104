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
    """none: count only; sere: to the most similar primary expert; top_k: drop all but primary_top_k slots; random: to a
    random primary expert."""
    similarity: str | None = None
    """Similarity artifact: a path, or, in a generate config, models:/NAME@ALIAS. Needed by policy sere."""
    metric: Metric = "cosine"
    """Which of the artifact's matrices to use."""
    primary_top_k: int = 2
    """Slots per decode row whose experts are primary (the paper's S): 1 to the model's top_k."""
    threshold: float = 0.5
    """Least similarity that re-routes (the paper's rho), 0 to 1. Useful values depend on the metric."""
    phase: Literal["decode", "all"] = "decode"
    """decode: prompts are never touched; all: prompt rows are treated as decode rows (the paper)."""
    min_tokens: int = 4
    """Steps with fewer decode rows than this are left alone: there is nothing to save, and quality suffers most."""
    max_tokens: int = 1024
    """Steps with more rows than this are left alone."""
    seed: int = 0
    """Seed of policy random."""
    check_model: bool = True
    """Refuse an artifact computed from other weights than the model's. Off: only layer and expert counts must match."""
    stats_dir: str | None = None
    """Folder for the counters (one pair of files per engine worker). None: nothing is counted. `sere generate` sets it."""

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
