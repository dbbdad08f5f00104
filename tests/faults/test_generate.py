"""A job with real engines on a cluster of three nodes, of which an engine, a node and at last the driver are killed.

`scripts/benchmarks/fault_matrix.py` does the same more often, and with every kind of death by itself.
"""

import importlib
import json
import random
import signal
import sys
from pathlib import Path

import mlflow
import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.long]


@pytest.fixture
def engines(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    # Set to the cluster's address meanwhile.
    monkeypatch.setenv("RAY_ADDRESS", "")
    yield importlib.import_module("faults.engines")
    for name in [name for name in sys.modules if name.split(".")[0] in ("faults", "simulated_engine")]:
        sys.modules.pop(name)


def test_no_row_is_lost_or_doubled(engines, tmp_path):
    num_rows, rng = 2500, random.Random(0)
    data = engines.make_prompts(tmp_path, num_rows)
    nodes = engines.Nodes()
    try:
        job = engines.Job(tmp_path, data, [*engines.SETTINGS, f"tracking.uri=sqlite:///{tmp_path}/ml.db"])
        session = job.start()
        for kind, moment in (("engine", 0.02), ("node", 0.15), ("driver", 0.4)):
            enough = int(moment * num_rows)
            assert job.wait_for(lambda enough=enough: engines.num_rows_written(job) >= enough, session), session.last_line
            assert engines.strike(kind, nodes, session, rng), f"there is no {kind}"
        assert session.wait().status == -signal.SIGKILL
        kept = engines.num_rows_written(job)
        assert kept >= 0.4 * num_rows
        ended = job.start().wait()
        assert ended.status == 0, ended.line
    finally:
        nodes.stop()
    found: dict[tuple[str, int], list[str | None]] = {}
    for file in Path(job.output).glob("results/*.parquet"):
        for row in pq.read_table(file).to_pylist():
            found.setdefault((row["source_file"], row["source_row"]), []).append(row["generated_text"])
    assert sorted(found) == sorted(("ab"[n >= 1250] + ".parquet", n % 1250) for n in range(num_rows))
    assert all(len(texts) == 1 and texts[0] is not None for texts in found.values())
    sessions = [json.loads(file.read_text()) for file in sorted((Path(job.output) / "sessions").iterdir())]
    assert len(sessions) == 2 and sessions[1]["num_rows"] == num_rows - kept, "what was written is not done again"
    assert json.loads((Path(job.output) / "summary.json").read_text())["num_sessions"] == 2
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/ml.db")
    try:
        (run,) = mlflow.search_runs(experiment_names=["sere-demo"], output_format="list")
    finally:
        mlflow.set_tracking_uri(None)
    assert run.info.status == "FINISHED" and run.data.metrics["num_rows"] == num_rows
    assert not any("Traceback" in log.read_text() for log in tmp_path.glob("session-*.log"))
