"""The processes of jobs below this one, found and counted. Those of other jobs on this machine are left alone."""

import time

import psutil

ENGINE, REPLICA, SIMULATED = "EngineCore", "ray::Replica", "ray::S"
# What a job may leave behind.
_OF_A_JOB = (ENGINE, REPLICA, "ray::SimulatedReplica", "ray::StruckReplica", "replica/watchdog.py")
_PATIENCE_S = 15.0
_seen: set[psutil.Process] = set()


def look() -> list[psutil.Process]:
    """All processes below this one, now and at any look before: what a lost node leaves behind is below it no more."""
    _seen.update(psutil.Process().children(recursive=True))
    _seen.difference_update([process for process in _seen if not process.is_running()])
    return list(_seen)


def processes(*words: str) -> list[psutil.Process]:
    """Those whose title has one of the words: Ray and vLLM name theirs."""
    found = []
    for process in look():
        try:
            title = " ".join([process.name(), *process.cmdline()])
            if any(word in title for word in words) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def left_over() -> list[psutil.Process]:
    """What is still there of jobs that have ended, after a moment to end."""
    end = time.monotonic() + _PATIENCE_S
    while (found := processes(*_OF_A_JOB)) and time.monotonic() < end:
        time.sleep(0.2)
    return found
