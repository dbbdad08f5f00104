"""The `sere` commands of the pipeline: generate, sweep, compare."""

import argparse

from sere.pipeline.runtime.command import Command, Surroundings, add_job_arguments, add_uri


def _generate(arguments: argparse.Namespace, around: Surroundings) -> None:
    from sere.conf.load import load_config
    from sere.conf.schema import GenerateConfig
    from sere.pipeline.generate.driver import generate
    from sere.pipeline.generate.summary import print_summary

    config = load_config(GenerateConfig, arguments.config, arguments.overrides)
    print_summary(generate(config, ray_address=around.ray_address), around.console)


def _sweep(arguments: argparse.Namespace, around: Surroundings) -> None:
    from sere.conf.load import load_config
    from sere.conf.schema import SweepConfig
    from sere.pipeline.compare.sweep import sweep

    config = load_config(SweepConfig, arguments.config, arguments.overrides)
    sweep(config, around.console, ray_address=around.ray_address)


def _compare(arguments: argparse.Namespace, around: Surroundings) -> None:
    from sere.pipeline.compare.report import compare

    compare(
        arguments.experiment,
        uri=arguments.uri,
        output=arguments.output,
        max_loss=arguments.max_loss,
        by=arguments.by,
        console=around.console,
    )


def _add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="MLflow experiment")
    add_uri(parser)
    parser.add_argument(
        "--output", default="runs", help="folder for report.html, compare.csv and compare.png (default: %(default)s)"
    )
    parser.add_argument(
        "--max-loss",
        type=float,
        default=0.02,
        help="quality loss allowed for the recommended configuration (default: %(default)s)",
    )
    parser.add_argument(
        "--by",
        choices=("speed", "active_experts"),
        default="speed",
        help="recommend the fastest, or the one with the fewest active experts: speeds of small or noisy runs say little "
        "(default: %(default)s)",
    )


GENERATE = Command(
    help="run a dataset through vLLM replicas",
    add_arguments=lambda parser: add_job_arguments(parser, "generate"),
    run=_generate,
    continues=True,
)
SWEEP = Command(
    help="run a dataset under a grid of configurations, and compare them",
    add_arguments=lambda parser: add_job_arguments(parser, "sweep"),
    run=_sweep,
    continues=True,
)
COMPARE = Command(
    help="compare the generate runs of an experiment",
    add_arguments=_add_compare_arguments,
    run=_compare,
)
