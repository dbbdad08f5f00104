"""The `sere` command. Its sub-commands are found by their entry points, so that this package need not know all of them.

Heavy packages are imported by the command that needs them, so `sere --help` is quick. The environment is read here and
nowhere below.
"""

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

from sere.pipeline.runtime.command import GROUP, Command, Surroundings

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
EXIT_TRY_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: schedulers can tell by it what to run again."""
EXIT_INTERRUPTED = 130


def find_commands() -> dict[str, Command]:
    """The commands of all installed packages, by name."""
    return {point.name: point.load() for point in sorted(metadata.entry_points(group=GROUP))}


def _parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sere",
        description="Batch inference for mixture-of-experts models with similarity-based expert re-routing.",
    )
    parser.add_argument("--version", action="version", version=f"sere {metadata.version('sere')}")
    words = parser.add_subparsers(dest="command", required=True)
    for name, command in commands.items():
        description = f"{command.help[0].upper()}{command.help[1:]}."
        command.add_arguments(words.add_parser(name, help=command.help, description=description))
    return parser


def _ray_address() -> str | None:
    address = os.environ.get("RAY_ADDRESS")
    # Ray's own word for none.
    return None if address in (None, "", "local") else address


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0; 2 for an error the user can mend; 75 where the same command may succeed when it is run again; 130
        if interrupted.
    """
    commands = find_commands()
    arguments = _parser(commands).parse_args(argv)
    command = commands[arguments.command]
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)

    from rich.console import Console

    from sere.conf.errors import ConfigError, TryAgainError

    # Where the output goes to a file, do not fold tables to 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        command.run(arguments, Surroundings(console=console, ray_address=_ray_address()))
    except ConfigError as error:
        print(f"sere: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return EXIT_TRY_AGAIN if isinstance(error, TryAgainError) else EXIT_USER_ERROR
    except KeyboardInterrupt:
        # Ray takes seconds to end. Whoever does not wait for it need not read where it was.
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
        print(f"sere: interrupted{', the same command continues' if command.continues else ''}", file=sys.stderr)  # noqa: T201
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
