"""Where runs are recorded, for every job."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where runs are recorded."""

    uri: str | None = "sqlite:///runs/mlflow.db"
    """MLflow tracking URI; empty: record nothing."""
    experiment: str = "sere"
    run_name: str | None = None
