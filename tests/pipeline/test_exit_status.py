"""What `sere` says of itself by its exit status, and that it ends quietly."""

import signal
import subprocess
import sys
import time

import pytest

from sere.conf.errors import ConfigError, TryAgainError
from sere.pipeline import cli
from sere.pipeline.runtime.command import Command

ENDING = """
import atexit, sys, time
from sere.pipeline import cli
from sere.pipeline.runtime.command import Command

def run(arguments, around):
    print("running", flush=True)
    time.sleep(60)

def end():
    print("ending", flush=True)
    time.sleep(60)

atexit.register(end)
cli.find_commands = lambda: {"x": Command(help="x", add_arguments=lambda parser: None, run=run, continues=True)}
sys.exit(cli.main(["x"]))
"""


@pytest.mark.parametrize(
    ("error", "status"), [(ConfigError("change\nthis"), 2), (TryAgainError("run\nit again"), 75), (None, 0)]
)
def test_status(error, status, monkeypatch, capsys):
    def run(arguments, around):
        if error is not None:
            raise error

    command = Command(help="x", add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(cli, "find_commands", lambda: {"x": command})
    assert cli.main(["x"]) == status
    assert capsys.readouterr().err.splitlines() == ([f"sere: {' '.join(str(error).split())}"] if error else [])


def test_ray_s_word_for_no_cluster(monkeypatch):
    found = []
    command = Command(help="x", add_arguments=lambda parser: None, run=lambda _, around: found.append(around.ray_address))
    monkeypatch.setattr(cli, "find_commands", lambda: {"x": command})
    for address in ("local", "", "10.0.0.1:6379"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        cli.main(["x"])
    assert found == [None, None, "10.0.0.1:6379"]


def test_a_second_interrupt_is_quiet():
    started = subprocess.Popen([sys.executable, "-c", ENDING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in ("running", "ending"):
        assert started.stdout.readline().strip() == line
        started.send_signal(signal.SIGINT)
    begun = time.monotonic()
    _, said = started.communicate(timeout=50)
    assert time.monotonic() - begun < 30 and started.returncode == 130
    assert said.splitlines() == ["sere: interrupted, the same command continues"]
