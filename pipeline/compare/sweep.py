"""`sere sweep`: a grid of configurations, one resumable generate job each, as nested MLflow runs, and their comparison.

Every configuration has engines of its own: what re-routes is built into an engine when it starts (compiled and captured with
it), and a cache of prompts' keys and values must not pass from one policy to another.
"""

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sere.conf.errors import ConfigError, TryAgainError
from sere.conf.load import load_config
from sere.conf.nested import digest_of, flatten
from sere.conf.schema import GenerateConfig, SweepConfig
from sere.conf.schema.named import unused_settings
from sere.pipeline.compare.report import compare
from sere.pipeline.generate.driver import generate
from sere.pipeline.generate.summary import print_summary
from sere.pipeline.runtime.storage import Storage
from sere.pipeline.tracking.tracker import resume, track

if TYPE_CHECKING:
    from rich.console import Console

_SHORT = {"reroute.policy": "", "reroute.primary_top_k": "S", "reroute.metric": "", "reroute.threshold": "rho"}


@dataclass(frozen=True)
class Point:
    """One configuration."""

    name: str
    config: GenerateConfig


def _text(value: Any) -> str:
    """A value as YAML on one line, for an override."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def _name(settings: dict[str, Any]) -> str:
    parts = []
    for key, value in settings.items():
        short = _SHORT.get(key, key.rsplit(".", 1)[-1] + "=")
        parts.append("".join(c if c.isalnum() or c in "=._-" else "-" for c in f"{short}{value}"))
    return ",".join(parts)


def _without_unused(point: dict[str, Any], policy: str, keys: set[str]) -> dict[str, Any]:
    """A point without the settings that its policy does not look at, given all keys that are set for it."""
    own = {key: key.removeprefix("reroute.") for key in keys if key.startswith("reroute.")}
    unused = unused_settings(policy, own.values())
    return {key: value for key, value in point.items() if own.get(key, "").split(".")[0] not in unused}


def expand(config: SweepConfig) -> list[Point]:
    """The grid's configurations in its order, each after the unmodified model it is compared with.

    Raises:
        ConfigError: if a setting of any of them is wrong: before anything runs.
    """
    grid = flatten(config.grid)
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"grid.{key} must be a list of values, got {values!r}")
    known = {"output", "overwrite", "data", "tracking.uri", "tracking.experiment", "tracking.run_name"}
    if known & set(grid):
        raise ConfigError(
            f"grid must not name {', '.join(sorted(known & set(grid)))}: all runs share it, or it is made for each"
        )
    found: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        for policy in ("none", settings.get("reroute.policy") or ""):
            point = {**settings, **({"reroute.policy": policy} if policy else {})}
            point = _without_unused(point, policy, {*point, *flatten(config.overrides)})
            name = _name({"reroute.policy": policy, **point}).strip(",")
            if found.get(name, point) != point:
                # Values that differ only in what a file's name cannot have.
                name += "," + digest_of(point)[:8]
            found.setdefault(name, point)
    points = []
    for name, settings in found.items():
        tracking = {"uri": config.tracking.uri, "experiment": config.tracking.experiment, "run_name": name}
        own = {"output": f"{config.output.rstrip('/')}/{name}", **{f"tracking.{key}": value for key, value in tracking.items()}}
        overrides = [f"{key}={_text(value)}" for key, value in {**flatten(config.overrides), **settings, **own}.items()]
        points.append(Point(name, load_config(GenerateConfig, config.base, overrides)))
    return points


def sweep(config: SweepConfig, console: "Console", *, ray_address: str | None = None) -> None:
    """Run every configuration, or go on with them, and compare.

    Args:
        config: The job.
        console: Where to print.
        ray_address: As in `generate`.

    Raises:
        ConfigError: if a setting is wrong, or the report has no place.
        ConfigError, TryAgainError: after all others have run, if some could not be run.
    """
    points = expand(config)
    _refuse_unwritable(Path(config.report))
    storage = Storage(config.output, points[0].config.storage_options)
    noted = storage.get_json("sweep.json") or {}
    failed: dict[str, ConfigError] = {}
    run_id = resume(config.tracking, noted.get("mlflow_run_id"))
    with track(config.tracking, kind="sweep", default_name="sweep", run_id=run_id) as tracker:
        storage.put_json("sweep.json", {"mlflow_run_id": tracker.run_id, "configurations": [point.name for point in points]})
        if run_id is None:
            tracker.log_config(config)
        for number, point in enumerate(points, start=1):
            console.print(f"[{number} of {len(points)}] {point.name}", markup=False, highlight=False, soft_wrap=True)
            try:
                print_summary(generate(point.config, ray_address=ray_address, parent_run_id=tracker.run_id), console)
            except ConfigError as error:
                failed[point.name] = error
                console.print(f"  failed: {error}", markup=False, highlight=False, soft_wrap=True)
        tracker.log_metrics({"num_configurations": len(points), "num_failed": len(failed)})
    if config.tracking.uri and len(failed) < len(points):
        compare(
            config.tracking.experiment,
            uri=config.tracking.uri,
            output=config.report,
            console=console,
            max_loss=config.max_loss,
            by=config.by,
        )
    if failed:
        name, why = next(iter(failed.items()))
        passes = all(isinstance(error, TryAgainError) for error in failed.values())
        raise (TryAgainError if passes else ConfigError)(
            f"{len(failed)} of {len(points)} configurations failed, first {name} ({why}): the same command tries them again"
        )


def _refuse_unwritable(folder: Path) -> None:
    """Before anything runs, not after all has run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"report {folder} cannot be written ({error.strerror}): choose another folder") from error
