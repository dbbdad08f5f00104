"""An S3 server on this machine, for benchmarks of jobs whose folders are on an object store."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "runs"


def options_of(port: int) -> dict[str, Any]:
    """`storage_options` for the server at a port."""
    return {"endpoint_url": f"http://127.0.0.1:{port}", "key": "id", "secret": "hunter2"}


@contextmanager
def object_store() -> Iterator[int]:
    """The port of a server that has an empty bucket."""
    import s3fs

    from tests.servers import free_port, wait_until_listening

    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        wait_until_listening(server, port)
        s3fs.S3FileSystem(**options_of(port)).mkdir(BUCKET)
        yield port
    finally:
        server.kill()
        server.wait()
