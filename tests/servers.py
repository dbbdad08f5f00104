"""Servers on this machine that tests start in processes of their own."""

import socket
import subprocess
import time


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until_listening(server: subprocess.Popen, port: int, *, timeout_s: float = 120) -> None:
    """Wait until a server takes connections; fail if it ends before."""
    deadline = time.monotonic() + timeout_s
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, "the server does not start"
        assert time.monotonic() < deadline, f"the server does not listen on port {port}"
        time.sleep(0.1)
