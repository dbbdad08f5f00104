"""A local Ray keeps to its machine; a cluster made by `ray start` is joined, and one that is not there is one line."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager

import pytest

from tests.conftest import ROOT
from tests.servers import free_port, wait_until_listening

pytestmark = pytest.mark.cluster

LISTENING = """
import ipaddress, json, os, sys
import psutil, ray
from sere.pipeline.runtime.cluster import start_ray

start_ray(1, address=None)

@ray.remote
class Actor:
    def ping(self):
        return os.getpid()

actor = Actor.remote()
ray.get(actor.ping.remote())
tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
found = [(p.name(), c.laddr.ip) for p in tree for c in p.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]

def is_loopback(text):
    address = ipaddress.ip_address(text)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback

print(json.dumps({
    "names": sorted({name for name, _ in found}),
    "open": [(name, ip) for name, ip in found if not is_loopback(ip)],
    "asks_for_a_token": ray._raylet.get_authentication_mode() == ray._raylet.AuthenticationMode.TOKEN,
}), flush=True)
"""
JOIN = """
import sys
from sere.conf.errors import ConfigError
from sere.pipeline.runtime.cluster import start_ray
import ray

try:
    start_ray(1, address=sys.argv[1])
except ConfigError as error:
    sys.exit(f"refused: {error}")
print(ray.get(ray.remote(lambda: "joined").remote()), ray.cluster_resources()["test_head"])
"""
UNASKED = """
import ray
from sere.pipeline.runtime.cluster import start_ray

start_ray(1, address=None)

@ray.remote
class Actor:
    def fail(self):
        raise ValueError("nobody asked")

    def answer(self): ...

actor = Actor.remote()
reference = actor.fail.remote()
ray.get(actor.answer.remote())
del reference
"""


def environment(home, **more):
    """Of a user with a home of his own, where Ray's token is."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith("RAY_") or key == "RAY_TMPDIR"}
    paths = os.pathsep.join(path for path in (str(ROOT / ".typing"), mine.get("PYTHONPATH")) if path)
    return {**mine, "HOME": str(home), "PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0", **more}


def python(code, *arguments, home, timeout=120, **more):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment(home, **more), capture_output=True, text=True, timeout=timeout)


def test_a_local_ray_listens_on_this_machine_only_and_asks_for_a_token(tmp_path):
    import json

    done = python(LISTENING, home=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"gcs_server", "raylet"} <= set(found["names"])
    assert found["open"] == [] and found["asks_for_a_token"]
    assert (tmp_path / ".ray" / "auth_token").read_text()


def test_an_error_that_nobody_asks_for_is_not_on_the_screen(tmp_path):
    """The last line is the job's: of what runs when a job ends with an error Ray would print every traceback after it."""
    done = python(UNASKED, home=tmp_path)
    assert done.returncode == 0 and "nobody asked" not in done.stdout + done.stderr


@contextmanager
def head(port, home):
    """A head in the foreground, which takes its processes with it."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--num-cpus=1"]
    options = ["--include-dashboard=false", f"--ray-client-server-port={free_port()}", '--resources={"test_head": 1}']
    # Ray notes there which cluster runs, for whoever looks for one. Not below tmp_path: paths of sockets are short.
    folder = tempfile.mkdtemp(prefix="sere-ray-")
    started = subprocess.Popen(
        [*command, *options, f"--temp-dir={folder}"],
        env=environment(home, RAY_TMPDIR=folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_listening(started, port)
        yield
    finally:
        started.send_signal(signal.SIGTERM)
        started.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_cluster_made_by_ray_start_is_joined_and_again_after_its_head_was_restarted(tmp_path):
    port = free_port()
    # What a local Ray leaves; from then on `ray start` asks for it.
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    for _ in range(2):
        with head(port, tmp_path):
            done = python(JOIN, f"127.0.0.1:{port}", home=tmp_path)
            assert done.returncode == 0 and "joined 1.0" in done.stdout, done.stderr
    with head(port, tmp_path):
        stranger = tmp_path / "stranger"
        stranger.mkdir()
        done = python(JOIN, f"127.0.0.1:{port}", home=stranger)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "cannot be joined" in done.stderr and "auth_token" in done.stderr


@pytest.fixture
def silent_server():
    """Takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        kept = []

        def serve():
            try:
                while True:
                    kept.append(server.accept())
            except OSError:
                return

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "127.0.0.1:99999999", "silent", "ray://127.0.0.1:1"])
def test_an_address_without_a_cluster_is_one_line_and_status_2(address, silent_server, tmp_path):
    if address == "silent":
        address = f"127.0.0.1:{silent_server}"
    started = time.monotonic()
    settings = [f"output={tmp_path}/out", "reroute.policy=none", "tracking.uri=''"]
    done = subprocess.run(
        [sys.executable, "-m", "sere.pipeline.cli", "generate", "conf/generate.yaml", *settings],
        env=environment(tmp_path, RAY_ADDRESS=address),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    # With all that is imported before, on a machine that does other things, too; Ray itself would try for some minutes.
    assert time.monotonic() - started < 90
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("sere: "))
    assert f"no Ray cluster answers at RAY_ADDRESS={address}" in line and "unset RAY_ADDRESS" in line
