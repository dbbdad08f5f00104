"""A replica before its engine starts."""

from pathlib import Path

import pyarrow as pa
import pytest

from sere.conf.schema import GenerateConfig, RerouteConfig
from sere.pipeline.generate.identity import SIMILARITY
from sere.pipeline.generate.parts import Parts
from sere.pipeline.generate.preflight import engine_arguments
from sere.pipeline.generate.replica.actor import Replica
from sere.pipeline.generate.replica.spec import ReplicaSpec
from sere.pipeline.runtime.storage import Storage


@pytest.mark.parametrize(
    ("reroute", "is_fetched"),
    [
        (RerouteConfig(policy="sere", similarity="/on/the/driver"), True),
        (RerouteConfig(policy="sere_t", similarity="/on/the/driver", compensation={"rank": 2}), True),
        (RerouteConfig(policy="oea", similarity="/on/the/driver", targets={"rule": "least_loss"}), True),
        (RerouteConfig(policy="oea"), False),
        (RerouteConfig(policy="none", similarity="/on/the/driver"), False),
    ],
    ids=lambda value: getattr(value, "policy", value),
)
def test_policies_that_need_the_artifact_find_it_on_the_replicas_node(tmp_path, reroute, is_fetched):
    storage = Storage(str(tmp_path))
    storage.put(SIMILARITY, b"the artifact")
    config = GenerateConfig(model="m", data="d", output=str(tmp_path), reroute=reroute)
    spec = ReplicaSpec(
        "s1-r1", config, engine_arguments(config, reroute, on_gpu=False), Parts(storage, "digest"), pa.schema([])
    )
    replica = Replica(spec)
    path = replica._arguments()["additional_config"]["sere"]["similarity"]
    assert (path != reroute.similarity) == is_fetched
    if is_fetched:
        assert Path(path).read_bytes() == b"the artifact"
