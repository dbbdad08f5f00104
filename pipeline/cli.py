"""The `sere` command. Heavy packages are imported by the job that needs them, so `sere --help` is quick."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Nothing is reported to anyone unless the user asks for it.
_QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
_URI = "sqlite:///runs/mlflow.db"
# Second words of `sere calibrate`; any other one is a config file.
_ARTIFACT_COMMANDS = {
    "inspect": "show an artifact's manifest and quality",
    "diff": "show how two artifacts differ",
    "promote": "make a version the champion",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sere",
        description="Batch inference for mixture-of-experts models with similarity-based expert re-routing.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("calibrate", "compute expert similarity from calibration text"),
        ("generate", "run a dataset through vLLM replicas"),
        ("sweep", "run a dataset under a grid of configurations, and compare them"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text.capitalize()}.")
        command.add_argument("config", help=f"YAML file; see conf/{name}.yaml")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")
    for name, text in _ARTIFACT_COMMANDS.items():
        command = commands.add_parser(f"calibrate {name}", help=text, description=f"{text.capitalize()}.")
        if name == "promote":
            command.add_argument("version", help="models:/NAME/VERSION or models:/NAME@ALIAS")
        else:
            for artifact in ("artifact",) if name == "inspect" else ("first", "second"):
                command.add_argument(artifact, help="path, or models:/NAME@ALIAS, or models:/NAME/VERSION")
        if name == "inspect":
            command.add_argument("--output", help="folder for the pictures")
        command.add_argument("--uri", default=_URI, help="MLflow tracking URI (default: %(default)s)")
    compare = commands.add_parser("compare", help="compare the generate runs of an experiment")
    compare.add_argument("experiment", help="MLflow experiment")
    compare.add_argument("--uri", default=_URI, help="MLflow tracking URI (default: %(default)s)")
    compare.add_argument(
        "--output", default="runs", help="folder for report.html, compare.csv and compare.png (default: %(default)s)"
    )
    compare.add_argument(
        "--max-loss",
        type=float,
        default=0.02,
        help="quality loss allowed for the recommended configuration (default: %(default)s)",
    )
    compare.add_argument(
        "--by",
        choices=("speed", "active_experts"),
        default="speed",
        help="recommend the fastest, or the one with the fewest active experts: speeds of small or noisy runs say little "
        "(default: %(default)s)",
    )
    return parser


def _run(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from sere.conf.schema import CalibrateConfig, GenerateConfig, SweepConfig

    # Where the output goes to a file, do not fold tables to 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 140)
    if arguments.command == "compare":
        from sere.pipeline.compare.report import compare

        compare(
            arguments.experiment,
            uri=arguments.uri,
            output=arguments.output,
            max_loss=arguments.max_loss,
            by=arguments.by,
            console=console,
        )
        return

    if arguments.command.startswith("calibrate "):
        _run_on_artifact(arguments, console)
        return

    from sere.conf.load import load_config

    if arguments.command == "calibrate":
        from sere.calibration_jobs.job import calibrate

        done = calibrate(load_config(CalibrateConfig, arguments.config, arguments.overrides))
        line = f"Finished before: {done.file}" if done.was_finished else f"Wrote {done.file}"
        if done.version is not None:
            line += f", version {done.version} of {done.name}{' and its champion' if done.promoted else ''}"
        if done.was_finished:
            line += " (overwrite=true starts anew)"
        console.print(line, soft_wrap=True, highlight=False)
    elif arguments.command == "sweep":
        from sere.pipeline.compare.sweep import sweep

        sweep(load_config(SweepConfig, arguments.config, arguments.overrides), console)
    else:
        from sere.pipeline.generate.driver import generate
        from sere.pipeline.generate.summary import print_summary

        print_summary(generate(load_config(GenerateConfig, arguments.config, arguments.overrides)), console)


def _run_on_artifact(arguments: argparse.Namespace, console: "Console") -> None:
    from sere.calibration_jobs.publish import versions

    if arguments.command == "calibrate inspect":
        versions.inspect(arguments.artifact, uri=arguments.uri, output=arguments.output, console=console)
    elif arguments.command == "calibrate diff":
        versions.diff(arguments.first, arguments.second, uri=arguments.uri, console=console)
    else:
        versions.promote(arguments.version, uri=arguments.uri, console=console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 2 for an error the user can mend, 130 if interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["calibrate"] and words[1:2] and words[1] in _ARTIFACT_COMMANDS:
        words[:2] = [" ".join(words[:2])]
    arguments = _parser().parse_args(words)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)

    from sere.conf.errors import ConfigError

    try:
        _run(arguments)
    except ConfigError as error:
        print(f"sere: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        kept = ", the same command continues" if arguments.command in ("calibrate", "generate", "sweep") else ""
        print(f"sere: interrupted{kept}", file=sys.stderr)  # noqa: T201
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
