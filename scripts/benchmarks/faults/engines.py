"""Kinds with real engines: an engine, a worker, a node or the driver dies at a random moment, or an engine stops."""

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from faults.jobs import ROOT, Job, Session
from faults.processes import ENGINE, REPLICA, look, processes
from faults.rows import Expected
from faults.tally import Tally

NUM_ROWS = 4000
SETTINGS = (
    "engine.num_replicas=2",
    "engine.max_num_seqs=16",
    "concurrent_batches=8",
    "batch_size=16",
    "checkpoint_rows=32",
    "reroute.policy=none",
    "preserve_order=false",
)
_CHAIN, _STALL_S = 4, 20
_SIGNALS = {"driver": signal.SIGKILL, "sigterm": signal.SIGTERM, "interrupt": signal.SIGINT}


def make_prompts(folder: Path, num_rows: int) -> Path:
    """The evaluation prompts, over and over, in two files."""
    rows = pq.read_table(ROOT / "assets" / "evaluation.parquet").select(["prompt", "reference", "task"])
    rows = pa.concat_tables([rows] * (1 + num_rows // len(rows))).slice(0, num_rows)
    (folder / "data").mkdir(parents=True)
    half = num_rows // 2
    pq.write_table(rows.slice(0, half), folder / "data" / "a.parquet")
    pq.write_table(rows.slice(half), folder / "data" / "b.parquet")
    return folder / "data"


def num_rows_written(job: Job) -> int:
    """Rows in parts."""
    return sum(pq.read_metadata(file).num_rows for file in Path(job.output).glob("results/part-*.parquet"))


class Nodes:
    """A cluster of a head node and two others, which may be lost and replaced."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.others = [self._cluster.add_node(num_cpus=2) for _ in range(2)]
        os.environ["RAY_ADDRESS"] = self._cluster.address

    def lose(self, node: Any) -> None:
        look()
        self._cluster.remove_node(node, allow_graceful=False)
        self.others.remove(node)
        self.others.append(self._cluster.add_node(num_cpus=2))

    def stop(self) -> None:
        self._cluster.shutdown()


class EngineArena:
    """What jobs with real engines share: the cluster, the input, and what an undisturbed job answers."""

    def __init__(self, scratch: Path, rng: random.Random) -> None:
        self.scratch, self.rng = scratch, rng
        self.nodes = Nodes()
        self.data = make_prompts(scratch, NUM_ROWS)
        self._num_jobs = 0
        undisturbed = self.job("engine.num_replicas=1")
        ended = undisturbed.start().wait(timeout_s=600)
        if ended.status:
            raise RuntimeError(f"the undisturbed job ended with {ended}")
        self.expected: Expected = {}
        for file in sorted(Path(undisturbed.output).glob("results/*.parquet")):
            for row in pq.read_table(file).to_pylist():
                self.expected[row["source_file"], row["source_row"]] = (row["id"], row["generated_text"])

    def job(self, *settings: str) -> Job:
        self._num_jobs += 1
        folder = self.scratch / f"job-{self._num_jobs:03d}"
        return Job(folder, self.data, [*SETTINGS, f"tracking.uri=sqlite:///{folder}/ml.db", *settings])

    def close(self) -> None:
        self.nodes.stop()


def strike(kind: str, nodes: Nodes, session: Session, rng: random.Random) -> bool:
    """Do it to one thing; False if there was none at that moment."""
    if kind in _SIGNALS:
        session.kill(_SIGNALS[kind])
        return True
    if kind == "node":
        nodes.lose(rng.choice(nodes.others))
        return True
    victims = processes(REPLICA if kind == "worker" else ENGINE)
    if not victims:
        return False
    victim = rng.choice(victims)
    if kind == "stop-engine":
        victim.suspend()
    else:
        victim.kill()
    return True


def _has_share(job: Job, share: float) -> bool:
    return num_rows_written(job) >= share * NUM_ROWS


def _run(kind: str, arena: EngineArena, num_strikes: int) -> Tally:
    tally = Tally(kind, "real")
    settings = [f"stall_timeout_s={_STALL_S}"] if kind == "stop-engine" else []
    while tally.num_strikes < num_strikes:
        job = arena.job(*settings)
        session = job.start()
        for moment in sorted(arena.rng.uniform(0.02, 0.9) for _ in range(min(_CHAIN, num_strikes - tally.num_strikes))):
            if not job.wait_for(partial(_has_share, job, moment), session):
                break
            time.sleep(arena.rng.random() / 2)
            if session.status is not None:
                break
            tally.num_strikes += strike(kind, arena.nodes, session, arena.rng)
            if kind in _SIGNALS:
                tally.ended(session.wait())
                session = job.start()
        if tally.ended(session.wait()).status == 0:
            tally.judge(job, arena.expected)
        else:
            tally.until_done(job, arena.expected)
        summary = job.storage.get_json("summary.json") or {}
        tally.notes["replicas replaced"] += int(summary.get("num_replaced_replicas", 0))
    return tally


ABOUT = {
    "engine": "An engine's process is killed (kill -9).",
    "worker": "A replica's worker is killed (kill -9).",
    "node": "A node is killed, with all that runs on it, and replaced.",
    "driver": "The driver is killed (kill -9).",
    "sigterm": "The driver gets SIGTERM.",
    "interrupt": "The driver gets Ctrl-C.",
    "stop-engine": f"An engine's process is stopped (SIGSTOP) for good; stall_timeout_s is {_STALL_S}.",
}
KINDS: dict[str, Callable[[EngineArena, int], Tally]] = {kind: partial(_run, kind) for kind in ABOUT}
