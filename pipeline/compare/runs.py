"""The finished runs of an experiment as configurations, and what makes two of them comparable."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

from sere.conf.nested import flatten
from sere.conf.schema import GenerateConfig, RerouteConfig
from sere.conf.schema.named import unused_settings
from sere.pipeline.compare.losses import Loss
from sere.pipeline.tracking.circumstances import CIRCUMSTANCES


@dataclass(frozen=True)
class Row:
    """One configuration: its latest run, and what comparing it found."""

    label: str
    policy: str
    group: tuple[tuple[str, str], ...]
    """Settings and values that have to be equal for two runs to be compared: model, data, decode batch, sampling, hardware."""
    run_id: str
    metrics: dict[str, float]
    by_task: dict[str, float]
    params: dict[str, str]
    started_ms: int
    commit: str
    loss: Loss | None = None
    """Against the unmodified model of the group."""
    pareto_active_experts: bool = False
    pareto_speed: bool = False
    recommended: bool = False
    speed_error: float | None = None
    """Standard error of its tokens/s; None where too little was recorded to tell."""

    @property
    def is_mixed(self) -> bool:
        """Whether parts of it were decoded in batches of another size: nothing can be recommended by it."""
        return self.params.get("mixed_batch", "").lower() == "true"

    @property
    def is_baseline(self) -> bool:
        return self.policy == "none"

    @property
    def batch(self) -> str:
        """The decode batch."""
        return dict(self.group)["engine.max_num_seqs"]


_GROUP_PREFIXES = ("sampling.", "engine.engine_kwargs", "engine.lora_adapters", "chat_template_kwargs")
# What makes two runs comparable, and their difference one of re-routing; with all of `sampling`.
_GROUP = (
    "model",
    "model_digest",
    "data",
    "num_rows",
    "prompt_column",
    "template",
    "messages_column",
    "sampling_column",
    "lora_column",
    "batch_size",
    "concurrent_batches",
    "order_by",
    "group_by_prefix",
    "engine.max_num_seqs",
    "engine.max_model_len",
    "engine.dtype",
    # Speeds depend on these.
    "engine.num_replicas",
    "engine.max_replicas",
    "engine.tensor_parallel_size",
    "engine.pipeline_parallel_size",
    "engine.enforce_eager",
    "engine.accelerator_type",
    # Answers and speeds depend on them; runs of older versions did not say.
    *CIRCUMSTANCES,
)
# Settings of which a label speaks only where they are not the default.
_OPTIONAL = ("phase", "min_tokens", "max_tokens", "seed", "policy_file")
# What overrides a policy's rules, key by key.
_OVERRIDES = ("reroute.votes.", "reroute.targets.", "reroute.compensation.", "reroute.per_layer.")


@functools.cache
def _defaults() -> dict[str, str]:
    """A run that was recorded before a setting existed had what is now its default."""
    values = flatten(dataclasses.asdict(GenerateConfig(model="", data="", output="")))
    return {key: str(value) for key, value in values.items()}


def _group(params: dict[str, str], data_digest: str) -> tuple[tuple[str, str], ...]:
    known = {**_defaults(), **params}
    keys = [*_GROUP, *sorted(key for key in known if key.startswith(_GROUP_PREFIXES))]
    # A structured output is one of several leaves; without one it is a leaf itself.
    return (*((key, known.get(key, "")) for key in keys if known.get(key) != "None"), ("data_digest", data_digest))


def similarity_of(params: dict[str, str]) -> str:
    """The artifact that a run used: its version as it was then, and by its digest; an alias may have moved since."""
    name = params.get("similarity_version") or params.get("reroute.similarity", "None")
    digest = params.get("similarity_digest", "")
    return f"{name} ({digest[:8]})" if digest else name


def _label(params: dict[str, str], *, with_similarity: bool) -> tuple[str, str]:
    """A short name of a configuration, and its policy."""
    policy = params.get("reroute.policy", "none")
    if policy == "none":
        return "unmodified", "none"
    overrides = [name for name in sorted(params) if name.startswith(_OVERRIDES)]
    unused = unused_settings(policy, (name.removeprefix("reroute.") for name in overrides))
    parts = [policy if "primary_top_k" in unused else f"{policy} S={params['reroute.primary_top_k']}"]
    if "threshold" not in unused:
        parts.append(f"{params['reroute.metric']} rho={float(params['reroute.threshold']):g}")
    if with_similarity and "similarity" not in unused:
        parts.append(similarity_of(params))
    parts += [f"{name.removeprefix('reroute.')}={params[name]}" for name in overrides]
    if params.get("reroute.weights", "None") != "None":
        parts.append(f"weights={params['reroute.weights']}")
    for field in dataclasses.fields(RerouteConfig):
        value = params.get(f"reroute.{field.name}", str(field.default))
        if field.name in _OPTIONAL and value != str(field.default):
            parts.append(f"{field.name}={value}")
    return ", ".join(parts), policy


def rows_of(runs: list[dict[str, Any]]) -> list[Row]:
    """The latest run of each configuration, unmodified first, then in order of first appearance.

    Runs that decode another model or data, or in other batches, are other configurations.
    """
    used = {
        similarity_of(run["params"])
        for run in runs
        if "similarity" not in unused_settings(run["params"].get("reroute.policy", "none"))
    }
    latest: dict[tuple[Any, ...], Row] = {}
    for run in runs:
        params = run["params"]
        metrics = {name: value for name, value in run["metrics"].items() if math.isfinite(value)}
        label, policy = _label(params, with_similarity=len(used) > 1)
        group = _group(params, run["data_digest"])
        by_task = {k.removeprefix("exact_match/"): v for k, v in metrics.items() if k.startswith("exact_match/")}
        latest[label, group] = Row(
            label, policy, group, run["run_id"], metrics, by_task, params, run["started_ms"], run["commit"]
        )
    return sorted(latest.values(), key=lambda row: not row.is_baseline)


def groups_of(rows: list[Row]) -> dict[str, list[Row]]:
    """Comparable rows together, by what tells their group from the others ("" if there is one group)."""
    groups: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    shared = set.intersection(*(set(group) for group in groups)) if groups else set()

    def name(group: tuple[tuple[str, str], ...]) -> str:
        return ", ".join(f"{key.rpartition('.')[2]} {value or 'unknown'}" for key, value in group if (key, value) not in shared)

    return {name(group): members for group, members in groups.items()}


def baseline_of(row: Row, rows: list[Row]) -> Row | None:
    """The unmodified model under the same circumstances."""
    return next((other for other in rows if other.is_baseline and other.group == row.group), None)


def difference(row: Row, baseline: Row | None, metric: str) -> float | None:
    """By how much a metric exceeds the unmodified model's; None for that model itself, or where one has no such metric."""
    if baseline is None or baseline is row or metric not in row.metrics or metric not in baseline.metrics:
        return None
    return row.metrics[metric] - baseline.metrics[metric]
