"""Kinds: the driver is killed at any time, or at one exact operation of a phase. Local folder, simulated engines."""

import re
import shutil
import signal
import time
from collections.abc import Callable

from faults.arena import Arena
from faults.deaths import MOMENTS, Death
from faults.jobs import Job
from faults.rows import whole_rows
from faults.session import Plan
from faults.tally import Tally

_BEGIN = r"put (job|described|run)\.json"
_REPLICAS_PART = r"put results/part-s\d+-\w+-r0000-{number:06d}"
# Names that the end of a job gives to parts that it writes.
_ENDS_PART = r"put results/part-(ordered|compact)-"
_DECLARE = r"put (errors\.parquet|summary\.json|manifest\.json)"
_DELETE = r"remove (results/|attempts/|nothing)"
_CHAIN = 4


def scan(arena: Arena, num_strikes: int) -> Tally:
    """While the input is looked through."""
    _, scan_s = _undisturbed_s(arena)
    return _chains(arena, "scan", num_strikes, lambda: Plan(scan_s=arena.rng.uniform(0, scan_s)))


def begin(arena: Arena, num_strikes: int) -> Tally:
    """While the folder is taken, and the job noted in it."""
    return _chains(arena, "begin", num_strikes, lambda: Plan(death=_draw(arena, _BEGIN, 3)))


def part(arena: Arena, num_strikes: int) -> Tally:
    """At a replica's write of a part, alone or with that replica, as when their machine goes."""

    def draw() -> Plan:
        number = arena.rng.randrange(5)
        return _at_a_part(arena, _REPLICAS_PART.format(number=number))

    return _chains(arena, "part", num_strikes, draw)


def anytime(arena: Arena, num_strikes: int) -> Tally:
    """At any time from its start on."""
    tally = arena.tally("anytime")
    session_s, _ = _undisturbed_s(arena)
    while tally.num_strikes < num_strikes:
        job = arena.job()
        for _ in range(min(_CHAIN, num_strikes - tally.num_strikes)):
            session = job.start(Plan())
            moment = time.monotonic() + arena.rng.uniform(0, session_s)
            job.wait_for(lambda moment=moment: time.monotonic() > moment, session)
            session.kill()
            if tally.ended(session.wait()).status == 0:
                break
            tally.num_strikes += 1
        arena.finish(job, tally)
    return tally


def order(arena: Arena, num_strikes: int) -> Tally:
    """While parts are written once more in the input's order, or what a session before has left of that is sorted out."""
    return _rewriting(arena, "order", num_strikes)


def join(arena: Arena, num_strikes: int) -> Tally:
    """The same where preserve_order is false: small parts are made into larger ones."""
    return _rewriting(arena, "join", num_strikes, "preserve_order=false")


def declare(arena: Arena, num_strikes: int) -> Tally:
    """At the write of the errors, the figures or the manifest."""
    return _at_the_end(arena, "declare", num_strikes, _DECLARE)


def delete(arena: Arena, num_strikes: int) -> Tally:
    """While what the result does not need is removed, after the manifest."""
    return _at_the_end(arena, "delete", num_strikes, _DELETE)


def _at_a_part(arena: Arena, operations: str) -> Plan:
    death = Death(operations, 0, arena.rng.choice(MOMENTS), share=arena.rng.random())
    return Plan(part_death=death, takes_writer=arena.rng.random() < 0.5)


def _undisturbed_s(arena: Arena) -> tuple[float, float]:
    """Seconds that a session takes, and its scan of the input."""
    job, begun = arena.job(), time.monotonic()
    job.start(Plan()).wait()
    elapsed_s = time.monotonic() - begun
    (scan_s,) = (float(line.split()[1]) for line in job.operations.read_text().splitlines() if line.startswith("scan"))
    return elapsed_s, scan_s


def _draw(arena: Arena, operations: str, most: int) -> Death:
    return Death(operations, arena.rng.randrange(most), arena.rng.choice(MOMENTS), share=arena.rng.random())


def _chains(arena: Arena, kind: str, num_strikes: int, draw: Callable[[], Plan]) -> Tally:
    """Jobs that nobody has begun, each struck several times before it is done."""
    tally = arena.tally(kind)
    while tally.num_strikes < num_strikes:
        _chain(arena, tally, arena.job(), num_strikes, draw, chain=_CHAIN)
    return tally


def _answered(arena: Arena, *settings: str) -> tuple[Job, Job]:
    """A job whose rows are all answered, and not more; and one that went on from there undisturbed."""
    answered = arena.job(*settings)
    answered.start(Plan(before_end=True)).wait()
    undisturbed = _copy(arena, answered)
    undisturbed.start(Plan()).wait()
    return answered, undisturbed


def _rewriting(arena: Arena, kind: str, num_strikes: int, *settings: str) -> Tally:
    tally = arena.tally(kind)
    answered, undisturbed = _answered(arena, *settings)
    names = [name for name in undisturbed.storage.sizes("results") if re.match(_ENDS_PART, f"put {name}")]

    def draw() -> Plan:
        if arena.rng.random() < 0.2:
            # What the driver itself writes there: a part without what is in others, too.
            return Plan(death=_draw(arena, r"(put|remove) results/", 3))
        number = re.search(r"-(\d{6}\b.*)", arena.rng.choice(names))[1]
        return _at_a_part(arena, rf"{_ENDS_PART}\w+-{re.escape(number)}")

    while tally.num_strikes < num_strikes:
        _chain(arena, tally, _copy(arena, answered), num_strikes, draw, chain=_CHAIN)
    return tally


def _at_the_end(arena: Arena, kind: str, num_strikes: int, operations: str) -> Tally:
    """Strikes at the driver's own operations, each in a job of its own: after some of them a job is finished."""
    tally = arena.tally(kind)
    answered, undisturbed = _answered(arena)
    most = sum(bool(re.match(operations, line)) for line in undisturbed.operations.read_text().splitlines())
    while tally.num_strikes < num_strikes:
        plan = Plan(death=_draw(arena, operations, most))
        _chain(arena, tally, _copy(arena, answered), num_strikes, lambda plan=plan: plan, chain=1)
    return tally


def _copy(arena: Arena, job: Job) -> Job:
    other = arena.job(*job.more)
    shutil.copytree(job.output, other.output)
    return other


def _chain(arena: Arena, tally: Tally, job: Job, num_strikes: int, draw: Callable[[], Plan], *, chain: int) -> None:
    for _ in range(min(chain, num_strikes - tally.num_strikes)):
        before = whole_rows(job.storage)
        if tally.ended(job.start(draw()).wait()).status != -signal.SIGKILL:
            break
        tally.num_strikes += 1
        tally.counts["thrown away"] += len(before - whole_rows(job.storage))
    arena.finish(job, tally)
