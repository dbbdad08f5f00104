"""One process at a time in a folder, on every kind of storage."""

import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from sere.conf.errors import ConfigError, TryAgainError
from sere.pipeline.runtime import lease
from sere.pipeline.runtime.lease import take_lease
from sere.pipeline.runtime.storage import Storage
from tests.conftest import ROOT

HOLD = """
import sys, time
from sere.pipeline.runtime import lease
from sere.pipeline.runtime.storage import Storage
lease.HEARTBEAT_S, lease._SILENCE_S = 0.2, 2.0
try:
    taken = lease.take_lease(Storage(sys.argv[1]))
except Exception as error:
    sys.exit(str(error))
print("taken", flush=True)
while True:
    time.sleep(0.1)
    try:
        taken.check()
    except Exception as error:
        sys.exit(str(error))
"""


def hold(uri):
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, uri], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(lease, "_SILENCE_S", 2.0)


def test_a_folder_that_was_left_is_free_at_once(uri, monkeypatch):
    monkeypatch.setattr(lease, "_SILENCE_S", 1000.0)
    for _ in range(3):
        taken = take_lease(Storage(uri))
        with pytest.raises(ConfigError, match=r"works in .*: wait for it, or choose another output"):
            take_lease(Storage(uri))
        taken.check(now=True)
        taken.release()
    assert len(Storage(uri).sizes("lease")) <= 1, "those before are removed"


@pytest.fixture(params=["local", "s3"])
def shared_uri(request, tmp_path):
    """A place that several processes see."""
    if request.param == "local":
        return str(tmp_path / "run")
    return f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}"


def test_of_several_processes_one_gets_in(shared_uri):
    processes = [hold(shared_uri) for _ in range(4)]
    lines = [process.stdout.readline() for process in processes]
    assert lines.count("taken\n") == 1
    for process, line in zip(processes, lines, strict=True):
        if not line:
            assert "works in" in process.communicate()[1]
        process.kill()
        process.wait()


def test_a_killed_process_does_not_hold_on(shared_uri):
    process = hold(shared_uri)
    assert process.stdout.readline() == "taken\n"
    with pytest.raises(ConfigError, match="works in"):
        take_lease(Storage(shared_uri))
    process.kill()
    process.wait()
    take_lease(Storage(shared_uri)).release()


def test_a_process_that_was_stopped_for_a_while_leaves_the_folder_to_its_successor(s3_bucket, tmp_path):
    uri = f"{s3_bucket}/{tmp_path.name}"
    process = hold(uri)
    assert process.stdout.readline() == "taken\n"
    process.send_signal(signal.SIGSTOP)
    taken = take_lease(Storage(uri))
    process.send_signal(signal.SIGCONT)
    _, error = process.communicate(timeout=20)
    assert "another one goes on with" in error and "leave it to that one" in error
    taken.check(now=True)
    taken.release()
    # The newest; the one before may have been written once more by a process that was stopped in the midst of that.
    *_, newest = Storage(uri).sizes("lease")
    assert newest == "lease/000002.json" and json.loads(Storage(uri).get(newest))["released"]


def test_a_program_that_is_busy_shows_signs_of_life(s3_bucket, tmp_path):
    taken = take_lease(Storage(f"{s3_bucket}/{tmp_path.name}"))
    # This thread does nothing for the lease; another one looks at it.
    refused = []

    def look():
        try:
            take_lease(Storage(f"{s3_bucket}/{tmp_path.name}"))
        except ConfigError as error:
            refused.append(error)

    other = threading.Thread(target=look)
    other.start()
    deadline = time.monotonic() + 20
    while other.is_alive():
        assert time.monotonic() < deadline
    assert len(refused) == 1
    taken.release()


def test_who_has_lost_the_folder_need_not_change_anything(uri):
    if Storage(uri).is_local:
        pytest.skip("a lock cannot be lost")
    taken = take_lease(Storage(uri))
    assert Storage(uri).create("lease/000002.json", b"another's")
    with pytest.raises(TryAgainError, match=r"another one goes on with .* leave it to that one"):
        taken.check(now=True)
    taken.release()
    assert Storage(uri).get("lease/000002.json") == b"another's"


@pytest.mark.parametrize("content", [b"", b"[1]", b"null"])
def test_a_damaged_lease_is_a_dead_ones(uri, content):
    if Storage(uri).is_local:
        pytest.skip("a local folder has a lock")
    Storage(uri).put("lease/000007.json", content)
    taken = take_lease(Storage(uri))
    assert list(Storage(uri).sizes("lease")) == ["lease/000008.json"]
    taken.release()


def test_a_link_is_not_followed_and_a_lock_not_truncated(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lock").symlink_to(mine)
    with pytest.raises(OSError, match="symbolic links"):
        take_lease(Storage(str(tmp_path / "run")))
    assert mine.read_text() == "mine"
    (tmp_path / "run/lock").unlink()
    (tmp_path / "run/lock").write_text("somebody's")
    take_lease(Storage(str(tmp_path / "run"))).release()
    assert (tmp_path / "run/lock").read_text() == "somebody's"
