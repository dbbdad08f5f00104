"""`sere sweep`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from sere.conf.errors import ConfigError
from sere.conf.schema.checks import one_of
from sere.conf.schema.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """`sere sweep`: one generate job per combination of settings, and their comparison."""

    base: str
    """YAML file of the generate job that all have in common."""
    output: str
    """Folder, or fsspec URI: each configuration gets a run directory below. The same command goes on with what is there."""
    grid: dict[str, Any]
    """Values by key of the generate config: {reroute.primary_top_k: [1, 2]}. All combinations are run, and unmodified vLLM
    beside them; those that differ only in settings that their policy ignores are run once."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Settings of the generate config that differ from base in every run."""
    report: str = "runs"
    """Local folder for the comparison's table, picture and page."""
    max_loss: float = 0.02
    """Quality loss allowed for the recommended configuration."""
    by: Literal["speed", "active_experts"] = "speed"
    """What it is chosen by: speed or active_experts."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the runs are recorded: the comparison is of all that is in the experiment, and run_name names the run that holds
    the others."""

    def __post_init__(self) -> None:
        one_of(self, "by")
        if not 0 <= self.max_loss <= 1:
            raise ConfigError(f"max_loss must be between 0 and 1, got {self.max_loss}")
        if not self.grid:
            raise ConfigError("grid must name a setting, for example {reroute.primary_top_k: [1, 2]}")
