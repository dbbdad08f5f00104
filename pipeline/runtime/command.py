"""A sub-command of `sere`, as packages offer it through the entry-point group `sere.commands`."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

GROUP = "sere.commands"
DEFAULT_TRACKING_URI = "sqlite:///runs/mlflow.db"


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the command line found around it; only it reads the environment."""

    console: "Console"
    ray_address: str | None
    """RAY_ADDRESS, the cluster to join; None: a local Ray."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One sub-command. The module that holds it imports nothing heavy; `run` does."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Surroundings], None]
    continues: bool = False
    """Whether the same command continues after an interruption."""


def add_job_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """The arguments of a command that reads a YAML file: `config` and `overrides`."""
    parser.add_argument("config", help=f"YAML file; see conf/{name}.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")


def add_uri(parser: argparse.ArgumentParser) -> None:
    """The MLflow store, as `uri`, of a command that has no YAML file."""
    parser.add_argument("--uri", default=DEFAULT_TRACKING_URI, help="MLflow tracking URI (default: %(default)s)")
