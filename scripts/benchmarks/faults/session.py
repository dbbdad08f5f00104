"""What runs in the process of a session with simulated engines: the very command, with a strike prepared."""

import atexit
import os
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
from sere.pipeline.generate import driver, finish
from sere.pipeline.generate.replica import actor


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What shall happen in a session."""

    delay_s: float = 0.5
    """Of the engines, for a batch."""
    ordered_rows: int = 100
    """Rows of a part that is put in order: few, so that a small job has many."""
    death: Death | None = None
    """The driver's, at an operation of its own."""
    part_death: Death | None = None
    """Of the first replica's driver, at an operation of that replica."""
    takes_replica: bool = False
    """The replica dies with it, as when their machine goes."""
    scan_s: float | None = None
    """The driver's, so many seconds after the scan of the input began."""


class StruckReplica(simulated_engine.SimulatedReplica):
    """A simulated replica, the first of which strikes."""

    part_death: Death | None = None
    takes_replica = False

    def __init__(self, spec: Any) -> None:
        super().__init__(spec)
        if self.part_death is not None and spec.name.endswith("-r0000"):
            own = (os.getpid(),) if self.takes_replica else ()
            arm(replace(self.part_death, victims=(*self.part_death.victims, *own)))


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
        StruckReplica.part_death = replace(plan.part_death, victims=(os.getpid(),))
        StruckReplica.takes_replica = plan.takes_replica
        actor.Replica = StruckReplica
    finish._ORDERED_ROWS = plan.ordered_rows
    arm(plan.death, operations)
    driver.scan_known = _struck_scan(driver.scan_known, operations, plan.scan_s)
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
