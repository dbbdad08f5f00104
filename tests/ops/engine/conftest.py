"""The engine that these tests share ends with the last of them."""

import pytest

from tests.ops.engine.engines import end_engine


@pytest.fixture(scope="package", autouse=True)
def _engine_ends():
    yield
    end_engine()
