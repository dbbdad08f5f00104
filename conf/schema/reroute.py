"""How a replica re-routes. Imports only the standard library: the vLLM plugin reads it in every engine process."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from sere.conf.errors import ConfigError, unknown_key
from sere.conf.schema.checks import at_least, one_of
from sere.conf.schema.named import PolicyName, make_rules
from sere.conf.schema.rules import Metric, Rules, WeightRule

_PER_LAYER = ("primary_top_k", "threshold", "metric", "votes", "targets", "weights", "compensation")
# Dials of votes and targets that a layer's own key takes the place of.
_SAID_AS = {"primary_top_k": ("primary_top_k", "by_batch"), "threshold": ("threshold",), "metric": ("metric",)}
_IN_FILE = ("policy", "seed", "per_layer", *_PER_LAYER)


@dataclass(frozen=True, kw_only=True, slots=True)
class RerouteConfig:
    """How a replica re-routes: vLLM's `additional_config["sere"]`, and the `reroute` section of a generate config."""

    policy: PolicyName = "sere"
    """Which experts stay active, where the others' slots go, with which weights, and what is added for what was taken away.
    none: count only, whatever the other keys say; sere: the paper's; oea: a token's own best active experts; sere_t: those, and
    compensation; xshare, des_vote, lynx, exfold, naee_skip: other papers'; top_k, random: controls. docs/policies.md compares
    them."""
    similarity: str | None = None
    """Artifact of `sere calibrate`: a path or, for `sere generate`, models:/NAME@ALIAS from the registry in tracking.uri.
    Needed by policies that use anything calibrated: sere, sere_t, exfold, naee_skip."""
    metric: Metric = "cosine"
    """Which of its matrices, for targets similar: frobenius, cosine, cka or weights."""
    primary_top_k: float = 2
    """Slots per decode row whose experts are primary (the paper's S): 1 to the model's top_k. 2.5: half of the rows have a
    third one."""
    threshold: float = 0.5
    """Least similarity that re-routes (the paper's rho), 0 to 1, for targets similar. Useful values depend on the metric: look
    at the off-diagonal range in MLflow."""
    votes: dict[str, Any] = field(default_factory=dict)
    """Overrides the policy's votes: {rule: all, top, mass, share, benefit or budget, and the rule's dials}."""
    targets: dict[str, Any] = field(default_factory=dict)
    """Overrides its targets: {rule: similar, own, random, least_loss, drop or drop_unvoted}."""
    weights: WeightRule | None = None
    """Overrides its weights: keep, renormalize, half, fold or router."""
    compensation: dict[str, Any] = field(default_factory=dict)
    """Overrides its compensation: {rule: none, mean or surrogate, rank: 2}."""
    per_layer: dict[Any, Any] = field(default_factory=dict)
    """Settings of single layers, by index: {3: {primary_top_k: 4}}. Keys: primary_top_k, threshold, metric, votes, targets,
    weights, compensation; each comes before what holds for all layers, votes.by_batch included."""
    policy_file: str | None = None
    """JSON file with policy, its dials and overrides, and per_layer. It replaces all of these keys, those it does not name
    included."""
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
        if not math.isfinite(self.primary_top_k):
            raise ConfigError(f"primary_top_k must be at least 1 and finite, got {self.primary_top_k}")
        if self.weights is not None and self.weights not in (valid := get_args(WeightRule)):
            raise ConfigError(f"weights must be one of {', '.join(valid)}, got {self.weights!r}")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold must be between 0 and 1, got {self.threshold}")
        if self.primary_top_k == int(self.primary_top_k):
            # As it is written: settings are compared, and shown, as text.
            object.__setattr__(self, "primary_top_k", int(self.primary_top_k))
        object.__setattr__(self, "per_layer", _by_index(self.per_layer))
        if self.policy == "none":
            # Whatever else is said: the baseline of a comparison is made by this one key.
            return
        if self.policy_file is not None:
            # What it says is checked when it is read.
            return
        needed = self.needs_tables
        if needed and not self.similarity:
            raise ConfigError(
                f"policy {self.policy!r} needs similarity: the path of an artifact made by `sere calibrate` (for {needed[0]})"
            )

    @property
    def replaced_by_file(self) -> dict[str, Any]:
        """Keys that are set beside `policy_file`, and count for nothing."""
        entries = {entry.name: entry.default for entry in dataclasses.fields(self) if entry.name in _IN_FILE}
        defaults = {name: {} if default is dataclasses.MISSING else default for name, default in entries.items()}
        found = {name: getattr(self, name) for name in _IN_FILE}
        return {name: value for name, value in found.items() if self.policy_file is not None and value != defaults[name]}

    @property
    def needs_tables(self) -> list[str]:
        """Names of the artifact's metrics and tables that any layer's policy uses."""
        every = (self.rules(None), *map(self.rules, self.per_layer))
        return list(dict.fromkeys(name for rules in every for name in rules.tables()))

    def resolved(self) -> "RerouteConfig":
        """With the content of `policy_file` in its place.

        Raises:
            ConfigError: if the file cannot be read, or what it says is wrong.
        """
        if self.policy == "none" or self.policy_file is None:
            return self
        try:
            values = json.loads(Path(self.policy_file).read_text())
        except OSError as error:
            raise ConfigError(f"policy_file {self.policy_file} cannot be read ({error.strerror}): give another one") from None
        except ValueError as error:
            raise ConfigError(f"policy_file {self.policy_file} is no JSON ({error}): mend it, or give another one") from None
        if not isinstance(values, dict):
            raise ConfigError(f"policy_file {self.policy_file} must hold keys and values, such as policy and primary_top_k")
        for key in values:
            if key not in _IN_FILE:
                raise unknown_key(key, list(_IN_FILE), f"policy_file {self.policy_file}")
        try:
            others = {key: value for key, value in self.to_dict().items() if key not in _IN_FILE}
            return RerouteConfig.from_dict({**others, "policy_file": None, **values})
        except ConfigError as error:
            raise ConfigError(f"policy_file {self.policy_file}: {error}") from None

    def rules(self, layer: int | None = None) -> Rules:
        """The policy of one layer; None: of layers without settings of their own.

        Raises:
            ConfigError: if a rule, one of its dials, or their combination is wrong.
        """
        if self.policy == "none":
            return make_rules("none", dials={}, votes={}, targets={}, weights=None, compensation={})
        assert self.policy_file is None, "resolved() first"
        own = self.per_layer.get(layer, {}) if layer is not None else {}
        dials = {name: own.get(name, getattr(self, name)) for name in ("primary_top_k", "threshold", "metric", "seed")}
        try:
            return make_rules(
                self.policy,
                dials=dials,
                votes=_merged(_but(self.votes, own), own.get("votes", {})),
                targets=_merged(_but(self.targets, own), own.get("targets", {})),
                weights=own.get("weights", self.weights),
                compensation=_merged(self.compensation, own.get("compensation", {})),
            )
        except ConfigError as error:
            raise ConfigError(f"per_layer.{layer}: {error}" if own else str(error)) from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RerouteConfig":
        """Build from `additional_config["sere"]`; an unknown key or a value of the wrong type is a ConfigError."""
        hints = get_type_hints(cls)
        for key, value in values.items():
            if key not in hints:
                raise unknown_key(key, list(hints), "additional_config['sere']")
            hint = hints[key]
            expected = {float: (int, float), dict[str, Any]: dict, dict[Any, Any]: dict}.get(hint, hint)
            if isinstance(expected, (type, tuple)) and (
                not isinstance(value, expected) or (isinstance(value, bool) and hint is not bool)
            ):
                names = {dict: "a mapping", (int, float): "a number"}
                raise ConfigError(f"{key} must be {names.get(expected) or hint.__name__}, got {value!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _but(base: Any, own: Mapping[str, Any]) -> Any:
    """What holds for all layers, less what a layer says by a key of its own."""
    if not isinstance(base, Mapping):
        return base
    replaced = {dial for key in own for dial in _SAID_AS.get(key, ())}
    return {key: value for key, value in base.items() if key not in replaced}


def _merged(base: Mapping[str, Any], over: Any) -> Any:
    """A layer's overrides over those of all layers; another rule begins anew."""
    if not isinstance(over, Mapping):
        return over
    return {**base, **over} if over.get("rule", base.get("rule")) == base.get("rule") else dict(over)


def _by_index(per_layer: Mapping[Any, Any]) -> dict[int, dict[str, Any]]:
    found = {}
    for layer, values in per_layer.items():
        # JSON has no integer keys.
        if not str(layer).isdecimal():
            raise ConfigError(f"per_layer must have layer indices as keys, got {layer!r}")
        index = int(layer)
        if not isinstance(values, Mapping):
            raise ConfigError(f"per_layer.{layer} must hold keys and values, got {values!r}")
        for key in values:
            if key not in _PER_LAYER:
                raise unknown_key(f"per_layer.{layer}.{key}", list(_PER_LAYER), "reroute")
        if index in found:
            raise ConfigError(f"per_layer names layer {index} twice: leave one out")
        found[index] = dict(values)
    return found
