"""The policies that have a name, each with its source, and how settings override them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from sere.conf.errors import ConfigError, unknown_key
from sere.conf.schema.rules import Compensation, Rules, Targets, Votes, WeightRule

_DIALS = {
    "votes": {
        "all": (),
        "top": ("primary_top_k", "by_batch", "order"),
        "mass": ("mass",),
        "share": ("share",),
        "benefit": ("benefit",),
        "budget": ("budget", "score", "first", "winner"),
    },
    "targets": {
        "similar": ("metric", "threshold"),
        "own": (),
        "random": ("seed",),
        "least_loss": (),
        "drop": (),
        "drop_unvoted": (),
    },
    "compensation": {"none": (), "mean": (), "surrogate": ("rank",)},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """A policy with a name. Its dials are `primary_top_k` and the like: those of its votes, targets and compensation."""

    votes: Mapping[str, Any]
    targets: str
    weights: WeightRule
    compensation: Mapping[str, Any] = field(default_factory=lambda: {"rule": "none"})


_TOP = {"rule": "top"}
# With a bias the router's own order loses less than that of weights (docs/benchmarks/policies.md); without, they are one.
_TOP_RANKED = {"rule": "top", "order": "selection"}
_WEIGHT, _NORM = {"rule": "budget", "score": "weight"}, {"rule": "budget", "score": "norm"}
NAMED: dict[str, Named] = {
    "none": Named(votes={"rule": "all"}, targets="drop_unvoted", weights="keep"),
    "sere": Named(votes=_TOP, targets="similar", weights="keep"),  # arXiv 2602.07616
    "oea": Named(votes=_TOP_RANKED, targets="own", weights="renormalize"),  # 2511.02237
    "sere_t": Named(votes=_TOP_RANKED, targets="own", weights="half", compensation={"rule": "surrogate", "rank": 0}),  # ours
    "xshare": Named(
        votes={"rule": "budget", "score": "probability", "first": True}, targets="own", weights="renormalize"
    ),  # 2602.07265
    "des_vote": Named(votes=_WEIGHT, targets="own", weights="renormalize"),  # 2602.00879
    "lynx": Named(
        votes={"rule": "budget", "score": "lynx", "winner": 0.5}, targets="own", weights="renormalize"
    ),  # 2411.08982v3; its constants are unpublished, so these are ours
    "exfold": Named(votes=_NORM, targets="least_loss", weights="fold"),  # 2608.24938
    "naee_skip": Named(votes={"rule": "share"}, targets="drop_unvoted", weights="renormalize"),  # 2402.14800
    "top_k": Named(votes=_TOP, targets="drop_unvoted", weights="router"),
    "random": Named(votes=_TOP, targets="random", weights="keep"),
}
PolicyName = Literal[
    "none", "sere", "oea", "sere_t", "xshare", "des_vote", "lynx", "exfold", "naee_skip", "top_k", "random"
]  # fmt: skip


_OVERRIDES = ("votes", "targets", "weights", "compensation", "per_layer", "policy_file")


def unused_settings(policy: str, set_keys: Iterable[str] = ()) -> set[str]:
    """Top-level keys of a `RerouteConfig` that a policy does not look at.

    Args:
        policy: Its name.
        set_keys: Keys that are set beside it, dotted: those that exchange its rules make others matter.
    """
    if policy == "none":
        dials = {"similarity", "metric", "primary_top_k", "threshold", "seed"}
        return {*dials, "phase", "min_tokens", "max_tokens", *_OVERRIDES}
    keys = set(set_keys)
    if policy not in NAMED or keys & {"policy_file"} or any(key.startswith("per_layer") for key in keys):
        return set()
    named, used = NAMED[policy], set[str]()
    if named.votes["rule"] == "top" or keys & {"votes", "votes.rule"}:
        used.add("primary_top_k")
    if named.targets == "similar":
        used |= {"metric", "threshold"}
    if named.targets == "random":
        used.add("seed")
    if any(key.startswith("targets") for key in keys):
        used |= {"metric", "threshold", "seed", "similarity"}
    if any(key.startswith(("votes", "compensation")) for key in keys):
        used.add("similarity")
    if (
        named.targets in ("similar", "least_loss")
        or named.compensation["rule"] != "none"
        or named.votes.get("score") == "norm"
        or named.votes["rule"] == "share"
    ):
        used.add("similarity")
    return {"similarity", "metric", "threshold", "seed", "primary_top_k"} - used


def make_rules(
    policy: str,
    *,
    dials: Mapping[str, Any],
    votes: Mapping[str, Any],
    targets: Mapping[str, Any],
    weights: str | None,
    compensation: Mapping[str, Any],
) -> Rules:
    """A named policy with what overrides it.

    Args:
        policy: A name of `NAMED`.
        dials: Values for rules that have such a dial (`primary_top_k`, `metric`, `threshold`, `seed`).
        votes: Overrides: `rule`, and its dials. Another rule than the policy's begins with that rule's defaults.
        targets: Likewise.
        weights: Another rule, or None.
        compensation: As votes.

    Raises:
        ConfigError: if a key is unknown or none of the rule's, a value is out of range, or rules do not fit together.
    """
    named = NAMED[policy]
    return Rules(
        votes=_part(Votes, "votes", named.votes, votes, dials),
        targets=_part(Targets, "targets", {"rule": named.targets}, targets, dials),
        weights=weights or named.weights,  # type: ignore[arg-type]
        compensation=_normal(_part(Compensation, "compensation", named.compensation, compensation, dials)),
    )


def _normal(found: Compensation) -> Compensation:
    """A surrogate of rank 0 is the mean."""
    return replace(found, rule="mean") if found.rule == "surrogate" and found.rank == 0 else found


def _part(kind: type[Any], name: str, base: Mapping[str, Any], overrides: Mapping[str, Any], dials: Mapping[str, Any]) -> Any:
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"{name} must hold keys and values, as in {name}: {{rule: {base['rule']}}}, got {overrides!r}")
    known = [entry.name for entry in fields(kind)]
    for key in overrides:
        if key not in known:
            raise unknown_key(f"{name}.{key}", known, "reroute")
    rule = overrides.get("rule", base["rule"])
    by_rule = _DIALS[name]
    if rule not in by_rule:
        raise ConfigError(f"{name}.rule must be one of {', '.join(by_rule)}, got {rule!r}")
    allowed = ("rule", "protect", *by_rule[rule])
    for key in overrides:
        if key not in allowed:
            dials_here = ", ".join(by_rule[rule]) or "none"
            others = [other for other, dials in by_rule.items() if key in dials]
            remedy = f"leave it out, or set {name}.rule={' or '.join(others)}"
            raise ConfigError(f"{name}.{key} is no dial of {name}.rule={rule} (its dials: {dials_here}): {remedy}")
    values = {key: value for key, value in dials.items() if key in by_rule[rule]}
    if rule == base["rule"]:
        values |= base
    values |= overrides
    _check_types(kind, name, values)
    if isinstance(values.get("by_batch"), Mapping):
        values["by_batch"] = _steps(values["by_batch"])
    return kind(**{**values, "rule": rule})


def _check_types(kind: type[Any], name: str, values: Mapping[str, Any]) -> None:
    """Refuse values of another type than the default's."""
    defaults = {entry.name: entry.default for entry in fields(kind)}
    for key, value in values.items():
        default = defaults[key]
        if key == "by_batch":
            fits, wanted = isinstance(value, (Mapping, tuple)), "a mapping of rows to primary_top_k"
        elif isinstance(default, bool):
            fits, wanted = isinstance(value, bool), "true or false"
        elif isinstance(default, str):
            fits, wanted = isinstance(value, str), "text"
        elif isinstance(default, int) and key != "primary_top_k":
            fits, wanted = isinstance(value, int) and not isinstance(value, bool), "an integer"
        else:
            fits, wanted = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
            fits = fits or (value is None and default is None)
        if not fits:
            raise ConfigError(f"{name}.{key} must be {wanted}, got {value!r}")


def _steps(found: Mapping[Any, Any]) -> tuple[tuple[int, float], ...]:
    try:
        steps = tuple(sorted((int(rows), float(step)) for rows, step in found.items()))
    except (TypeError, ValueError):
        raise ConfigError(f"votes.by_batch must map decode rows to primary_top_k, as in {{1: 4, 16: 2}}, got {found}") from None
    if not steps or steps[0][0] < 1 or len(steps) > 8:
        raise ConfigError(f"votes.by_batch must have 1 to 8 entries from 1 row on, got {found}")
    return steps
