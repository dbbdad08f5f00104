"""Every kind of storage, and a Ray."""

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


@pytest.fixture(scope="module")
def local_ray():
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()
