"""Kind: a replica's process stops. Simulated engines; those of engines that stop are in `engines`."""

import signal
import time

import psutil

from faults.arena import Arena
from faults.processes import processes
from faults.session import Plan
from faults.tally import Tally

_STALL_S = 5
_CHAIN = 3


def stopped(arena: Arena, num_strikes: int) -> Tally:
    """A replica's process is stopped (SIGSTOP) for longer than stall_timeout_s, and goes on later, or never."""
    tally = arena.tally("stop-replica")
    while tally.num_strikes < num_strikes:
        job = arena.job(f"stall_timeout_s={_STALL_S}")
        session = job.start(Plan(delay_s=1.0))
        for share in sorted(arena.rng.uniform(0.02, 0.8) for _ in range(min(_CHAIN, num_strikes - tally.num_strikes))):
            if not arena.wait_for_share(job, session, share):
                break
            _stop_one(arena, tally)
        tally.ended(session.wait())
        arena.finish(job, tally)
    return tally


def _stop_one(arena: Arena, tally: Tally) -> None:
    victims = [process for process in processes("ray::SimulatedReplica") if process.status() != psutil.STATUS_STOPPED]
    if not victims:
        return
    victim = arena.rng.choice(victims)
    victim.suspend()
    tally.num_strikes += 1
    if arena.rng.random() < 0.5:
        time.sleep(_STALL_S + arena.rng.uniform(2, 4))
        tally.notes["went on later"] += 1
        try:
            victim.send_signal(signal.SIGCONT)
        except psutil.NoSuchProcess:
            tally.notes["was gone by then"] += 1
