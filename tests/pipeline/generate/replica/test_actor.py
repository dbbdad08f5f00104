"""A replica before its engine starts, and what it holds when it cannot write."""

import asyncio
from pathlib import Path

import pyarrow as pa
import pytest

from sere.conf.schema import GenerateConfig, RerouteConfig
from sere.pipeline.generate.identity import SIMILARITY
from sere.pipeline.generate.parts import Parts
from sere.pipeline.generate.preflight import engine_arguments
from sere.pipeline.generate.replica.actor import Replica
from sere.pipeline.generate.replica.answers import Answer
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


SCHEMA = pa.schema([("id", pa.string()), ("prompt", pa.string())])


def replica_of(folder, num_rows, **changes):
    """A replica that was given a batch."""
    config = GenerateConfig(model="m", data="d", output=str(folder), **changes)
    replica = Replica(ReplicaSpec("s0001-ab-r0001", config, {}, Parts(Storage(str(folder), patience_s=0.1), "digest"), SCHEMA))
    table = pa.table(
        {
            "id": [str(row) for row in range(num_rows)],
            "prompt": ["the same" * 40] * num_rows,
            "source_file": ["f"] * num_rows,
            "source_row": range(num_rows),
        }
    )
    replica._tables[0], replica._unwritten[0], replica._row_bytes[0] = table, num_rows, table.nbytes / num_rows
    return replica


async def finish(replica, rows):
    for row in rows:
        await replica._finish(0, row, None, None)


class Engine:
    """Answers at once."""

    async def answer(self, request, tokens):
        return Answer("text", 1, 2, "stop")


def test_a_part_is_written_when_it_is_full(tmp_path):
    replica = replica_of(tmp_path, 1000, part_mib=0.02)
    replica._engine = Engine()
    asyncio.run(finish(replica, range(1000)))
    sizes = list(replica._spec.parts.storage.sizes("results").values())
    assert len(sizes) > 1
    # However little such rows become in a file, memory does not grow.
    assert replica._compression == 8 and replica._finished_bytes < 9 * 0.02 * 2**20


def test_what_could_not_be_written_counts_again(tmp_path, monkeypatch):
    replica = replica_of(tmp_path, 20)
    replica._engine = Engine()
    asyncio.run(finish(replica, range(20)))
    before = replica._finished_bytes
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", refuse)
        with pytest.raises(OSError, match="full"):
            asyncio.run(replica.write())
    assert replica._finished_bytes == before > 0 and len(replica._finished) == 20
    asyncio.run(replica.write())
    assert replica._finished_bytes == 0 and replica._spec.parts.scan().num_rows == 20


def refuse(parts, name, table):
    raise OSError("the disk is full")
