"""Kinds: the disk of the run directory is full, or cannot be written to. It mounts file systems, which only root may."""

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from faults.arena import Arena
from faults.session import Plan
from faults.tally import Tally

_CLONE_NEWNS = 0x00020000
_PAGE = 4096
_CHAIN = 4


def have_own_mounts() -> bool:
    """Give this process, and what it starts from now on, mounts that nobody else sees; False where that is not allowed."""
    if ctypes.CDLL(None).unshare(_CLONE_NEWNS):
        return False
    return not subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True).returncode


def full_disk(arena: Arena, num_strikes: int) -> Tally:
    """The disk of the run directory, a small tmpfs, has no room left from some moment on; then it has room again."""
    tally = arena.tally("full-disk")
    while tally.num_strikes < num_strikes:
        job = arena.job()
        ballast = Path(job.output) / "ballast"
        with _mounted(job.output, "-t", "tmpfs", "-o", "size=16m", "tmpfs"):
            for share in _shares(arena, num_strikes - tally.num_strikes):
                session = job.start(Plan())
                if arena.wait_for_share(job, session, share):
                    _fill(ballast, spare=arena.rng.choice((0, 0, 1, 4)) * _PAGE)
                    tally.num_strikes += 1
                tally.ended(session.wait())
                ballast.unlink(missing_ok=True)
            arena.finish(job, tally)
    return tally


def read_only(arena: Arena, num_strikes: int) -> Tally:
    """The run directory is mounted read-only from some moment on; then it can be written to again."""
    tally = arena.tally("read-only")
    while tally.num_strikes < num_strikes:
        job = arena.job()
        Path(job.output).mkdir()
        for share in _shares(arena, num_strikes - tally.num_strikes):
            session = job.start(Plan())
            if not arena.wait_for_share(job, session, share):
                tally.ended(session.wait())
                break
            # A mount of its own: what has open files cannot be made read-only.
            with _mounted(job.output, "--bind", job.output):
                _run("mount", "-o", "remount,bind,ro", job.output)
                tally.num_strikes += 1
                tally.ended(session.wait())
        arena.finish(job, tally)
    return tally


def _shares(arena: Arena, most: int) -> list[float]:
    """Moments: from the start on to when the last rows are put in order."""
    return sorted(arena.rng.uniform(-0.1, 1.1) for _ in range(min(_CHAIN, most)))


def _fill(ballast: Path, *, spare: int) -> None:
    """Write until there is no room, and leave some."""
    with ballast.open("wb", buffering=0) as opened, contextlib.suppress(OSError):
        while True:
            opened.write(bytes(_PAGE))
    os.truncate(ballast, max(0, ballast.stat().st_size // _PAGE * _PAGE - spare))


@contextmanager
def _mounted(folder: str, *arguments: str) -> Iterator[None]:
    Path(folder).mkdir(parents=True, exist_ok=True)
    _run("mount", *arguments, folder)
    try:
        yield
    finally:
        # Lost replicas may have files open.
        _run("umount", "--lazy", folder)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
