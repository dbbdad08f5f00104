"""Where runs are recorded, for every job."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where runs are recorded."""

    uri: str | None = "sqlite:///runs/mlflow.db"
    """MLflow tracking URI; empty records nothing."""
    experiment: str = "sere"
    """MLflow experiment; `sere compare` reads one."""
    run_name: str | None = None
    """Name of the run; null: the job's name, or the policy of a generate job."""
