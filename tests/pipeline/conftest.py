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


@pytest.fixture(params=["local", "memory", "s3"])
def uri(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "run")
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}"
    import fsspec

    fsspec.filesystem("memory").store.clear()
    return "memory://bucket/run"
