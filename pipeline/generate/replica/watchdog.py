"""Ends a process's children when it dies: run as `python watchdog.py PID`, by the process itself.

An engine's own processes outlive a killed replica, and would keep its GPU's memory from the replica that takes its place.
"""

import sys
import time

import psutil


def watch(pid: int) -> None:
    """Follow a process until it is gone, then kill what it had started."""
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
            child.kill()
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    watch(int(sys.argv[1]))
