"""Every kind of storage."""

import pytest


@pytest.fixture(params=["local", "memory", "s3"])
def uri(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "run")
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}"
    import fsspec

    fsspec.filesystem("memory").store.clear()
    return "memory://bucket/run"
