"""A job with real engines on a cluster of three nodes, of which an engine, a node and at last the driver are killed.

`scripts/benchmarks/fault_matrix.py` does the same more often, and with every kind of death by itself.
"""

import json
import random
import signal
import sys

import mlflow
import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.long]


@pytest.fixture
def fault_matrix(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    yield __import__("fault_matrix")
    sys.modules.pop("fault_matrix")


def test_no_row_is_lost_or_doubled(fault_matrix, tmp_path):
    num_rows, rng = 2500, random.Random(0)
    data = fault_matrix.make_prompts(tmp_path, num_rows)
    nodes = fault_matrix.Nodes()
    try:
        trial = fault_matrix.Trial(tmp_path, data, nodes.address, num_replicas=2)
        trial.start()
        struck = []
        for kind, moment in (("engine", 0.02), ("node", 0.15), ("driver", 0.4)):
            assert trial.wait_for_rows(int(moment * num_rows)), "the job must still run when something is killed"
            struck.append(fault_matrix.strike(kind, trial, nodes, rng))
        assert trial.wait() == -signal.SIGKILL
        kept = trial.rows()
        assert kept >= 0.4 * num_rows
        trial.start()
        assert trial.wait() == 0, trial.log.read_text()[-3000:]
    finally:
        nodes.stop()
    assert not any("nothing" in text for text in struck)
    found = fault_matrix.answers(trial.output)
    assert sorted(found) == sorted(("ab"[n >= 1250] + ".parquet", n % 1250) for n in range(num_rows))
    assert all(len(texts) == 1 and texts[0] is not None for texts in found.values())
    sessions = [json.loads(file.read_text()) for file in sorted((trial.output / "sessions").iterdir())]
    assert len(sessions) == 2 and sessions[1]["num_rows"] == num_rows - kept, "what was written is not done again"
    assert json.loads((trial.output / "summary.json").read_text())["num_sessions"] == 2
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/ml.db")
    try:
        (run,) = mlflow.search_runs(experiment_names=["sere-demo"], output_format="list")
    finally:
        mlflow.set_tracking_uri(None)
    assert run.info.status == "FINISHED" and run.data.metrics["num_rows"] == num_rows
    assert "Traceback" not in trial.log.read_text()
