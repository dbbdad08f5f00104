"""Kinds: an object store that fails or is late, and several drivers in one of its folders. A real S3 server on this machine."""

import json
import signal
import time

from object_store import BUCKET, object_store, options_of

from faults.arena import Arena
from faults.deaths import MOMENTS, Death
from faults.jobs import Job, Session
from faults.session import Plan
from faults.tally import Tally

# As in sere.pipeline.runtime.lease: a driver that is silent for so long has lost the folder.
_SILENCE_S = 15.0
_ANY = r"(put|create|remove) "


def refusing(arena: Arena, num_strikes: int) -> Tally:
    """The store answers 503 to one request in ten; a strike is a job."""
    return _behind_proxy(arena, "s3-503", num_strikes, share=0.1)


def late(arena: Arena, num_strikes: int) -> Tally:
    """The store answers one request in ten three seconds late; a strike is a job."""
    return _behind_proxy(arena, "s3-late", num_strikes, share=0.0, late_share=0.1, late_s=3.0)


def _behind_proxy(arena: Arena, kind: str, num_strikes: int, **proxy: float) -> Tally:
    from tests.failing_proxy import failing_proxy

    tally = arena.tally(kind)
    with object_store() as port:
        while tally.num_strikes < num_strikes:
            with failing_proxy(port, seed=arena.rng.randrange(10**6), **proxy) as (address, refused):
                job = _job(arena, address)
                tally.num_strikes += 1
                arena.finish(job, tally)
                tally.notes["requests refused"] += len(refused)
    return tally


def driver(arena: Arena, num_strikes: int) -> Tally:
    """The driver is killed at one operation of any phase, on an object store, and started again at once."""
    tally = arena.tally("s3-driver")
    with object_store() as port:
        job = _job(arena, port)
        tally.until_done(job, arena.expected, Plan())
        most = len([line for line in job.operations.read_text().splitlines() if not line.startswith("scan")])
        while tally.num_strikes < num_strikes:
            job = _job(arena, port)
            for _ in range(min(3, num_strikes - tally.num_strikes)):
                death = Death(_ANY, arena.rng.randrange(most), arena.rng.choice(MOMENTS), share=arena.rng.random())
                if tally.ended(job.start(Plan(death=death)).wait()).status != -signal.SIGKILL:
                    break
                tally.num_strikes += 1
            arena.finish(job, tally)
    return tally


def together(arena: Arena, num_strikes: int) -> Tally:
    """Two drivers are started at the same time; a strike is a job."""
    return _two(arena, "two-together", num_strikes, is_together=True)


def second(arena: Arena, num_strikes: int) -> Tally:
    """A second driver is started while the first works; a strike is a job."""
    return _two(arena, "two-second", num_strikes, is_together=False)


def _two(arena: Arena, kind: str, num_strikes: int, *, is_together: bool) -> Tally:
    tally = arena.tally(kind)
    with object_store() as port:
        while tally.num_strikes < num_strikes:
            job = _job(arena, port)
            first = job.start(Plan())
            if not is_together:
                arena.wait_for_share(job, first, arena.rng.uniform(0.02, 0.9))
            other = job.start(Plan())
            tally.num_strikes += 1
            for session in (first, other):
                tally.ended(session.wait())
            arena.finish(job, tally)
    return tally


def stopped(arena: Arena, num_strikes: int) -> Tally:
    """The driver is stopped (SIGSTOP) for longer than its lease lasts, and goes on while a second one works, or after it."""
    tally = arena.tally("s3-stopped")
    with object_store() as port:
        while tally.num_strikes < num_strikes:
            job = _job(arena, port)
            first = job.start(Plan(delay_s=1.0))
            if not arena.wait_for_share(job, first, arena.rng.uniform(0.02, 0.7)):
                raise RuntimeError(f"the driver ended before it was stopped: {first.last_line}")
            first.kill(signal.SIGSTOP)
            tally.num_strikes += 1
            _take_over(arena, job, first, tally)
            arena.finish(job, tally)
    return tally


def _take_over(arena: Arena, job: Job, first: Session, tally: Tally) -> None:
    """Start a second driver beside one that is stopped, and let that one go on at some time."""
    other = job.start(Plan(delay_s=1.0))
    goes_on = time.monotonic() + _SILENCE_S + arena.rng.uniform(1, 25)
    job.wait_for(lambda: time.monotonic() > goes_on, other)
    first.kill(signal.SIGCONT)
    for session in (other, first):
        tally.ended(session.wait())


def _job(arena: Arena, port: int) -> Job:
    """A job whose run directory is on the server at a port."""
    # The client would try again by itself, and leave nothing to the job.
    options = {**options_of(port), "config_kwargs": {"retries": {"total_max_attempts": 1}}}
    return arena.job(f"storage_options={json.dumps(options)}", bucket=BUCKET, options=options)
