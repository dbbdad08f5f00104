"""Does to `sere generate` jobs what goes wrong with long ones, and counts rows lost, doubled and changed.

    python scripts/benchmarks/fault_matrix.py --out docs/benchmarks/faults
    python scripts/benchmarks/fault_matrix.py --kinds order delete --strikes 10 --out docs/benchmarks/faults

Each job is started again by the same command until it ends with 0, and its rows are compared with those expected. What an
earlier run measured of other kinds stays in OUT.json, and on the page. `faults/` holds the kinds.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from benchmark import environment, positive, report, report_path
from faults import disks, drivers, engines, replicas, stores, tracking
from faults.arena import Arena
from faults.engines import EngineArena
from faults.jobs import ROOT
from faults.page import WRONG, lines, read_kinds
from faults.tally import Tally

# By name: what does it, and how many strikes.
SIMULATED: dict[str, tuple[Callable[[Arena, int], Any], int]] = {
    "anytime": (drivers.anytime, 20),
    "scan": (drivers.scan, 12),
    "begin": (drivers.begin, 12),
    "part": (drivers.part, 24),
    "order": (drivers.order, 20),
    "join": (drivers.join, 10),
    "declare": (drivers.declare, 12),
    "delete": (drivers.delete, 12),
    "stop-replica": (replicas.stopped, 9),
    "full-disk": (disks.full_disk, 12),
    "read-only": (disks.read_only, 8),
    "s3-503": (stores.refusing, 5),
    "s3-late": (stores.late, 4),
    "s3-driver": (stores.driver, 9),
    "s3-stopped": (stores.stopped, 6),
    "two-together": (stores.together, 5),
    "two-second": (stores.second, 5),
    "mlflow-restarted": (tracking.restarted, 6),
    "mlflow-gone": (tracking.gone, 4),
}
REAL = {"engine": 8, "worker": 8, "node": 8, "driver": 8, "sigterm": 4, "interrupt": 4, "stop-engine": 6}
NEEDS_ROOT = ("full-disk", "read-only")


def main() -> None:
    kinds = [*REAL, *SIMULATED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=kinds, metavar="KIND", help=f"default: {' '.join(kinds)}")
    parser.add_argument("--strikes", type=positive, help="of each kind (default: as many as are on the page)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=report_path, help="writes OUT.md and OUT.json")
    arguments = parser.parse_args()
    # A shell that starts this in the background ignores Ctrl-C in it and in the drivers.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if set(NEEDS_ROOT) & set(arguments.kinds) and not disks.have_own_mounts():
        parser.error(f"{' and '.join(NEEDS_ROOT)} mount file systems, which only root may: leave them out of --kinds")
    # Servers, and the proxy before one, are those of the tests.
    sys.path.append(str(ROOT))
    about = {name: (kind.__doc__ or "").splitlines()[0] for name, (kind, _) in SIMULATED.items()} | engines.ABOUT
    measured = read_kinds(arguments.out)
    with ExitStack() as stack:
        arena: EngineArena | None = None
        for name in arguments.kinds:
            if name in REAL and arena is None:
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sere-faults-")))
                arena = stack.enter_context(closing(EngineArena(scratch, random.Random(arguments.seed))))
            measure = partial(engines.KINDS[name], arena) if name in REAL else partial(simulated, name, arguments.seed)
            tally = measure(arguments.strikes or (REAL[name] if name in REAL else SIMULATED[name][1]))
            measured[name] = tally.as_values() | {"environment": environment()}
            ordered = {name: measured[name] for name in kinds if name in measured}
            report("What is lost when something goes wrong", lines(ordered, about), arguments.out, kinds=ordered)
    sys.exit(any(measured[name]["counts"].get(count) for name in arguments.kinds for count in WRONG))


def simulated(name: str, seed: int, num_strikes: int) -> Tally:
    """The strikes of a kind with simulated engines, on a Ray cluster of its own."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        with tempfile.TemporaryDirectory(prefix="sere-faults-") as scratch:
            return SIMULATED[name][0](Arena(Path(scratch), random.Random(f"{seed} {name}")), num_strikes)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
