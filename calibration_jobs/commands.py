"""The `sere` commands of calibration: calibrate, and what is done with its artifacts."""

import argparse

from sere.conf.errors import ConfigError
from sere.pipeline.runtime.command import Command, Surroundings, add_job_arguments, add_uri

_ACTIONS = {
    "inspect": "show an artifact's manifest and quality",
    "diff": "show how two artifacts differ",
    "promote": "make a version the champion",
}


def _calibrate(arguments: argparse.Namespace, around: Surroundings) -> None:
    if arguments.config in _ACTIONS:
        raise ConfigError(f"`sere calibrate {arguments.config}` is now `sere artifact {arguments.config}`")

    from sere.calibration_jobs.job import calibrate
    from sere.conf.load import load_config
    from sere.conf.schema import CalibrateConfig

    config = load_config(CalibrateConfig, arguments.config, arguments.overrides)
    done = calibrate(config, ray_address=around.ray_address)
    line = f"Finished before: {done.file}" if done.was_finished else f"Wrote {done.file}"
    if done.version is not None:
        line += f", version {done.version} of {done.name}{' and its champion' if done.promoted else ''}"
    if done.was_finished:
        line += " (overwrite=true starts anew)"
    around.console.print(line, soft_wrap=True, highlight=False)


def _add_artifact_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    for name, text in _ACTIONS.items():
        action = actions.add_parser(name, help=text, description=f"{text.capitalize()}.")
        if name == "promote":
            action.add_argument("version", help="models:/NAME/VERSION or models:/NAME@ALIAS")
        else:
            for artifact in ("artifact",) if name == "inspect" else ("first", "second"):
                action.add_argument(artifact, help="path, or models:/NAME@ALIAS, or models:/NAME/VERSION")
        if name == "inspect":
            action.add_argument("--output", help="folder for the pictures")
        add_uri(action)


def _artifact(arguments: argparse.Namespace, around: Surroundings) -> None:
    from sere.calibration_jobs.publish.diff import diff
    from sere.calibration_jobs.publish.inspect import inspect
    from sere.calibration_jobs.publish.promote import promote

    if arguments.action == "inspect":
        inspect(arguments.artifact, uri=arguments.uri, output=arguments.output, console=around.console)
    elif arguments.action == "diff":
        diff(arguments.first, arguments.second, uri=arguments.uri, console=around.console)
    else:
        promote(arguments.version, uri=arguments.uri, console=around.console)


CALIBRATE = Command(
    help="compute expert similarity from calibration text",
    add_arguments=lambda parser: add_job_arguments(parser, "calibrate"),
    run=_calibrate,
    continues=True,
)
ARTIFACT = Command(
    help="look at similarity artifacts, compare two, choose one",
    add_arguments=_add_artifact_arguments,
    run=_artifact,
)
