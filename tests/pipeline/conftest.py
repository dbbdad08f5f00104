"""A real S3 server on this machine."""

import pytest


@pytest.fixture(scope="session")
def s3_bucket():
    """The URI of a bucket. The server's address and keys are in the environment, for subprocesses too."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server_class = pytest.importorskip("moto.server", reason="moto is not installed").ThreadedMotoServer
    server = server_class(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import fsspec

        fsspec.filesystem("s3").mkdir("runs")
        yield "s3://runs"
    server.stop()
