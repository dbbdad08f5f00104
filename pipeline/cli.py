"""The `sere` command. Heavy packages are imported by the job that needs them, so `sere --help` is quick."""

import argparse
import os
import sys
from collections.abc import Sequence

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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sere",
        description="Batch inference for mixture-of-experts models with similarity-based expert re-routing.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("calibrate", "compute expert similarity from calibration text"),
        ("generate", "run a dataset through vLLM replicas"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text.capitalize()}.")
        command.add_argument("config", help=f"YAML file; see conf/{name}.yaml")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")
    compare = commands.add_parser("compare", help="compare the generate runs of an experiment")
    compare.add_argument("experiment", help="MLflow experiment")
    compare.add_argument("--uri", default="sqlite:///runs/mlflow.db", help="MLflow tracking URI (default: %(default)s)")
    compare.add_argument("--output", default="runs", help="folder for compare.csv and compare.png (default: %(default)s)")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from conf.schema import CalibrateConfig, GenerateConfig

    # Where the output goes to a file, do not fold tables to 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 140)
    if arguments.command == "compare":
        from pipeline.report import compare

        compare(arguments.experiment, uri=arguments.uri, output=arguments.output, console=console)
        return

    from conf.load import load_config

    if arguments.command == "calibrate":
        from calibration_jobs.job import calibrate

        file, version = calibrate(load_config(CalibrateConfig, arguments.config, arguments.overrides))
        registered = f", registered as version {version}" if version is not None else ""
        console.print(f"Wrote {file}{registered}", soft_wrap=True, highlight=False)
    else:
        from pipeline.generate import generate

        config = load_config(GenerateConfig, arguments.config, arguments.overrides)
        metrics = generate(config)
        line = f"Wrote {config.output}: {metrics['num_rows']:.0f} rows, {metrics['num_errors']:.0f} with errors"
        if "exact_match" in metrics:
            line += f", exact match {metrics['exact_match']:.3f}"
        if "active_experts_after" in metrics:
            line += f", active experts per step {metrics['active_experts_before']:.1f} -> {metrics['active_experts_after']:.1f}"
        console.print(line, soft_wrap=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, or 2 for an error the user can mend."""
    arguments = _parser().parse_args(argv)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)

    from conf.schema import ConfigError

    try:
        _run(arguments)
    except ConfigError as error:
        print(f"sere: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("sere: interrupted, nothing was written", file=sys.stderr)  # noqa: T201
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
