"""Ends a process's children when it dies, and clears up: run as `python watchdog.py PID FOLDER`, by the process itself.

An engine's own processes outlive a killed replica, and would keep its GPU's memory from the replica that takes its place.
"""

import contextlib
import shutil
import sys
import time
from pathlib import Path

import psutil


def watch(pid: int, scratch: str) -> None:
    """Follow a process until it is gone, then kill what it had started and remove its folder, but for a log: that may be all
    that says why."""
    try:
        parent = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    own = psutil.Process()
    children: set[psutil.Process] = set()
    # A process that was forked by a child that is gone is known from before.
    while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
        try:
            children = {child for child in children if child.is_running()} | set(parent.children(recursive=True))
        except psutil.NoSuchProcess:
            break
        time.sleep(2)
    for child in children - {own}:
        # `kill` refuses a process that has the same number and is not the same.
        try:
            # Python's own ends by itself, and removes the shared memory of those that it served.
            if "multiprocessing.resource_tracker" not in " ".join(child.cmdline()):
                child.kill()
        except psutil.NoSuchProcess:
            continue
    for path in Path(scratch).iterdir() if Path(scratch).is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix != ".log":
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        Path(scratch).rmdir()


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2])
