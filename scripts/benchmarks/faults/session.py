"""What runs in the process of a session with simulated engines: the very command, with a strike prepared."""

import atexit
import os
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import simulated_engine
from ray import cloudpickle

from faults import deaths
from faults.deaths import Death, arm
from sere.pipeline import cli
from sere.pipeline.generate import driver
from sere.pipeline.generate.parts import Parts


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What shall happen in a session."""

    delay_s: float = 0.5
    """Of the engines, for a batch."""
    death: Death | None = None
    """The driver's, at an operation of its own."""
    part_death: Death | None = None
    """The driver's, at the write of a part by whoever writes it: a replica, or a task at the end."""
    takes_writer: bool = False
    """Whoever writes dies with it, as when their machine goes."""
    scan_s: float | None = None
    """The driver's, so many seconds after the scan of the input began."""
    before_end: bool = False
    """The driver's, when all rows are answered and nothing is done with them yet."""


class StruckParts(Parts):
    """Parts whose writing strikes in whatever process it is done."""

    death: Death
    takes_writer = False

    def write(self, name: str, table: Any) -> Any:
        death, operation = self.death, f"put results/part-{name}.parquet"
        if re.match(death.operations, operation):
            own = (os.getpid(),) if self.takes_writer else ()
            arm(replace(death, operations=re.escape(operation), victims=(*death.victims, *own)))
        return super().write(name, table)


def run_session(arguments: list[str], folder: Path, log: Path, operations: Path, plan: Plan, address: str) -> None:
    """Run `sere ARGUMENTS` in this process, and end it as the command ends.

    Args:
        arguments: Of the command.
        folder: Where it is run.
        log: Gets what it prints.
        operations: Gets the names of the driver's storage operations.
        plan: What shall happen.
        address: Of the Ray cluster.
    """
    os.environ["RAY_ADDRESS"] = address
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(opened, descriptor)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    simulated_engine.simulate_engines(delay_s=plan.delay_s)
    for module in (deaths, sys.modules[__name__]):
        cloudpickle.register_pickle_by_value(module)
    if plan.part_death is not None:
        StruckParts.death = replace(plan.part_death, victims=(os.getpid(),))
        StruckParts.takes_writer = plan.takes_writer
        driver.Parts = StruckParts
    arm(plan.death, operations)
    driver.scan_known = _struck_scan(driver.scan_known, operations, plan.scan_s)
    if plan.before_end:
        driver.finish = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    status = cli.main(arguments)
    # A forked process would leave them out.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.exit(status)


def _struck_scan(scan: Any, operations: Path, after_s: float | None) -> Any:
    def run(*arguments: Any, **options: Any) -> Any:
        if after_s is not None:
            threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        begun = time.monotonic()
        found = scan(*arguments, **options)
        with operations.open("a") as opened:
            opened.write(f"scan {time.monotonic() - begun:.3f}\n")
        return found

    return run
