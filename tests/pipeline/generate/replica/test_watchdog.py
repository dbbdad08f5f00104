"""What a killed process leaves behind: nothing."""

import signal
import subprocess
import sys
import time
from multiprocessing import shared_memory
from pathlib import Path

import psutil
import pytest

from sere.pipeline.generate.replica import watchdog

PARENT = """
import multiprocessing, os, subprocess, sys, time
from multiprocessing import shared_memory

def child(queue):
    queue.put((os.getpid(), shared_memory.SharedMemory(create=True, size=100).name))
    time.sleep(1000)

if __name__ == "__main__":
    subprocess.Popen([sys.executable, sys.argv[1], str(os.getpid()), sys.argv[2]])
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    context.Process(target=child, args=(queue,)).start()
    print(*queue.get(), flush=True)
    time.sleep(1000)
"""


def left(folder):
    """Names in a folder; None if it is gone."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else None


@pytest.mark.parametrize("log", [None, "replica.log"])
def test_children_shared_memory_and_scratch_go_with_a_killed_process(tmp_path, log):
    scratch = tmp_path / "scratch"
    (scratch / "folder").mkdir(parents=True)
    (scratch / "folder/counters").write_text("")
    (scratch / "socket").write_text("")
    if log:
        (scratch / log).write_text("why")
    file = tmp_path / "parent.py"
    file.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, file, watchdog.__file__, scratch], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    pid, name = parent.stdout.readline().split()
    shared_memory.SharedMemory(name=name).close()
    # The watchdog looks every two seconds.
    time.sleep(3)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 30
    while psutil.pid_exists(int(pid)) or (Path("/dev/shm") / name).exists() or left(scratch) != ([log] if log else None):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    with pytest.raises(FileNotFoundError):
        shared_memory.SharedMemory(name=name)
