"""Kinds: MLflow's server is killed while a job records to it. Simulated engines, a real server on this machine."""

import subprocess
import sys
import time
from pathlib import Path

from faults.arena import Arena
from faults.jobs import ROOT, Job
from faults.session import Plan
from faults.tally import Tally

_DELAY_S = 1.5


class Server:
    """An MLflow server that may be killed and started again, always at the same address and with the same store."""

    def __init__(self, folder: Path) -> None:
        from tests.servers import free_port

        folder.mkdir()
        self._folder, self._port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        from tests.servers import wait_until_listening

        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        command += [
            "--backend-store-uri",
            f"sqlite:///{self._folder}/ml.db",
            "--artifacts-destination",
            str(self._folder / "files"),
        ]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        wait_until_listening(self._process, self._port)

    def kill(self) -> None:
        """With the processes that serve."""
        import psutil

        for process in [*psutil.Process(self._process.pid).children(recursive=True), self._process]:
            process.kill()
        self._process.wait()


def restarted(arena: Arena, num_strikes: int) -> Tally:
    """MLflow's server is killed while the job works, and started again some seconds later."""
    tally = arena.tally("mlflow-restarted")
    server = Server(arena.scratch / "mlflow")
    try:
        while tally.num_strikes < num_strikes:
            job = arena.job(f"tracking.uri={server.uri}")
            session = job.start(Plan(delay_s=_DELAY_S))
            for share in sorted(arena.rng.uniform(0, 0.9) for _ in range(min(2, num_strikes - tally.num_strikes))):
                if not arena.wait_for_share(job, session, share):
                    break
                server.kill()
                tally.num_strikes += 1
                time.sleep(arena.rng.uniform(0, 5))
                server.start()
            tally.ended(session.wait())
            arena.finish(job, tally)
            _count_runs(server, job, tally, len(arena.expected))
    finally:
        server.kill()
    return tally


def gone(arena: Arena, num_strikes: int) -> Tally:
    """MLflow's server is killed while the job works, and gone at its end; then it comes back, or tracking.uri is emptied."""
    tally = arena.tally("mlflow-gone")
    server = Server(arena.scratch / "mlflow")
    while tally.num_strikes < num_strikes:
        job = arena.job(f"tracking.uri={server.uri}")
        session = job.start(Plan(delay_s=_DELAY_S))
        if not arena.wait_for_share(job, session, arena.rng.uniform(0.02, 0.9)):
            raise RuntimeError(f"the job ended before the server was killed: {session.last_line}")
        server.kill()
        tally.num_strikes += 1
        tally.ended(session.wait())
        comes_back = tally.num_strikes % 2 == 1
        if not comes_back:
            arena.finish(job, tally, "tracking.uri=null")
        server.start()
        if comes_back:
            arena.finish(job, tally)
            _count_runs(server, job, tally, len(arena.expected))
    server.kill()
    return tally


def _count_runs(server: Server, job: Job, tally: Tally, num_rows: int) -> None:
    """What the store holds of a finished job: one run, with its figures."""
    import mlflow

    client = mlflow.MlflowClient(server.uri)
    run = client.get_run(job.storage.get_json("run.json")["mlflow_run_id"])
    tally.notes["runs with the figures"] += run.data.metrics.get("num_rows") == num_rows
    tally.notes[f"runs marked {run.info.status}"] += 1
    tally.notes["runs in the store"] = len(client.search_runs([run.info.experiment_id]))
