"""Kills parts of running `sere generate` jobs at random moments, and counts rows lost, doubled and changed.

    python scripts/benchmarks/fault_matrix.py --rounds 3 --out docs/benchmarks/faults

Each trial is a job with two vLLM replicas on a Ray cluster of three nodes on this machine. What is killed: an engine's
process, a replica's worker, a whole node (all with kill -9), the driver (kill -9, SIGTERM, Ctrl-C). A job whose driver is
gone is started again by the same command until it ends. The rows are compared with those of an undisturbed greedy run.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from benchmark import environment, positive, report, report_path

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("engine", "worker", "node", "driver", "sigterm", "interrupt")
SIGNALS = {"driver": signal.SIGKILL, "sigterm": signal.SIGTERM, "interrupt": signal.SIGINT}


def make_prompts(folder: Path, num_rows: int) -> Path:
    """The evaluation prompts, over and over, in two files."""
    rows = pq.read_table(ROOT / "assets" / "evaluation.parquet").select(["prompt", "reference", "task"])
    rows = pa.concat_tables([rows] * (1 + num_rows // len(rows))).slice(0, num_rows)
    (folder / "data").mkdir()
    half = num_rows // 2
    pq.write_table(rows.slice(0, half), folder / "data" / "a.parquet")
    pq.write_table(rows.slice(half), folder / "data" / "b.parquet")
    return folder / "data"


class Trial:
    """One job, started as often as it takes."""

    def __init__(self, folder: Path, data: Path, address: str, *, num_replicas: int) -> None:
        self.output = folder / "run"
        settings = [f"data={data}", f"output={self.output}", f"tracking.uri=sqlite:///{folder}/ml.db"]
        settings += [f"engine.num_replicas={num_replicas}", "concurrent_batches=8", "batch_size=16", "checkpoint_rows=32"]
        settings += ["reroute.policy=none", "preserve_order=false", "engine.max_num_seqs=16"]
        self.command = [sys.executable, "-m", "sere.pipeline.cli", "generate", "conf/generate.yaml", *settings]
        self.environment = {**os.environ, "RAY_ADDRESS": address}
        self.log = folder / "driver.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def rows(self) -> int:
        """Rows in parts."""
        return sum(pq.read_metadata(file).num_rows for file in self.output.glob("results/part-*.parquet"))

    def wait_for_rows(self, least: int, *, timeout_s: float = 240) -> bool:
        """Wait until that many rows are written; False if the job ended before."""
        end = time.monotonic() + timeout_s
        while self.rows() < least:
            if self.process.poll() is not None:
                return False
            if time.monotonic() > end:
                raise TimeoutError(f"{self.rows()} rows after {timeout_s:.0f} s: {self.log.read_text()[-2000:]}")
            time.sleep(0.05)
        return True

    def wait(self) -> int:
        return self.process.wait(timeout=600)


def processes(word: str) -> list[psutil.Process]:
    """Processes below this one whose title has a word (Ray and vLLM name theirs): other jobs on this machine are left alone.

    Ray adopts what its dead workers leave behind, so that is below this one too.
    """
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join([process.name(), *process.cmdline()])
            if word in title and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def strike(kind: str, trial: Trial, cluster: object, rng: random.Random) -> str:
    """Kill one thing; returns what it was."""
    if kind in SIGNALS:
        os.kill(trial.process.pid, SIGNALS[kind])
        return f"driver {trial.process.pid}"
    if kind == "node":
        node = rng.choice(cluster.others)
        cluster.lose(node)
        return f"node {node.node_id[:8]}"
    victims = processes("EngineCore" if kind == "engine" else "ray::Replica")
    if not victims:
        return "nothing: there was none at that moment"
    victim = rng.choice(victims)
    victim.kill()
    return f"{kind} {victim.pid}"


class Nodes:
    """A cluster of a head node and two others, which may be lost and replaced."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.others = [self._cluster.add_node(num_cpus=2) for _ in range(2)]
        self.address = self._cluster.address

    def lose(self, node: object) -> None:
        self._cluster.remove_node(node, allow_graceful=False)
        self.others.remove(node)
        self.others.append(self._cluster.add_node(num_cpus=2))

    def stop(self) -> None:
        self._cluster.shutdown()


def answers(output: Path) -> dict[tuple[str, int], list[str | None]]:
    """Texts by row: more than one where a row was doubled."""
    found: dict[tuple[str, int], list[str | None]] = {}
    for file in sorted(output.glob("results/*.parquet")):
        for row in pq.read_table(file).to_pylist():
            found.setdefault((row["source_file"], row["source_row"]), []).append(row["generated_text"])
    return found


def run_trial(kind: str, folder: Path, data: Path, nodes: Nodes, expected: dict, rng: random.Random, *, strikes: int) -> dict:
    """A job with several strikes at random moments; returns what became of its rows."""
    trial = Trial(folder, data, nodes.address, num_replicas=2)
    trial.start()
    struck = []
    moments = sorted(rng.uniform(0.02, 0.9) for _ in range(strikes))
    restarts = 0
    for moment in moments:
        if not trial.wait_for_rows(int(moment * len(expected))):
            break
        time.sleep(rng.random() / 2)
        if trial.process.poll() is not None:
            break
        struck.append(strike(kind, trial, nodes, rng))
        if kind in SIGNALS:
            trial.wait()
            restarts += 1
            trial.start()
    status = trial.wait()
    if status:
        raise RuntimeError(f"{kind}: the job ended with {status}: {trial.log.read_text()[-3000:]}")
    found = answers(trial.output)
    time.sleep(2)
    return {
        "kind": kind,
        "struck": struck,
        "driver_restarts": restarts,
        "rows": len(expected),
        "lost": len(set(expected) - set(found)),
        "doubled": sum(len(texts) - 1 for texts in found.values()),
        "unexpected": len(set(found) - set(expected)),
        "errors": sum(texts[0] is None for texts in found.values()),
        "changed": sum(texts[0] != expected[row][0] for row, texts in found.items() if row in expected),
        "orphans": len(processes("EngineCore")),
        "summary": json.loads((trial.output / "summary.json").read_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--rounds", type=positive, default=2, help="jobs per kind")
    parser.add_argument("--strikes", type=positive, default=2, help="strikes per job")
    parser.add_argument("--num-rows", type=positive, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=report_path, help="writes OUT.md and OUT.json")
    arguments = parser.parse_args()
    # A shell that starts this in the background ignores Ctrl-C in it and in the drivers.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rng = random.Random(arguments.seed)
    nodes = Nodes()
    trials = []
    try:
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            data = make_prompts(place, arguments.num_rows)
            (place / "undisturbed").mkdir()
            undisturbed = Trial(place / "undisturbed", data, nodes.address, num_replicas=1)
            undisturbed.start()
            if undisturbed.wait():
                raise RuntimeError(undisturbed.log.read_text()[-3000:])
            expected = answers(undisturbed.output)
            for number in range(arguments.rounds):
                for kind in arguments.kinds:
                    folder = place / f"{kind}-{number}"
                    folder.mkdir()
                    trials.append(run_trial(kind, folder, data, nodes, expected, rng, strikes=arguments.strikes))
                    print(json.dumps({k: v for k, v in trials[-1].items() if k != "summary"}), flush=True)
    finally:
        nodes.stop()
    report("What is lost when something dies", table(arguments, trials), arguments.out, trials=trials)
    bad = [trial for trial in trials if trial["lost"] or trial["doubled"] or trial["unexpected"] or trial["errors"]]
    sys.exit(1 if bad else 0)


def table(arguments: argparse.Namespace, trials: list[dict]) -> list[str]:
    """The report's lines."""
    lines = [
        environment(),
        "",
        "Two replicas of the bundled model on a Ray cluster of three nodes on one machine; strikes at random moments.",
        "*changed*: the text is not that of the undisturbed run, which decoded in other batches: rounding. *left over*: engine",
        "processes that outlived the job.",
        "",
        "| killed | jobs | strikes | drivers again | replaced | rows | lost | doubled | errors | changed | left over |",
        "|---" * 11 + "|",
    ]
    for kind in arguments.kinds:
        some = [trial for trial in trials if trial["kind"] == kind]
        sums = [sum(trial[name] for trial in some) for name in ("lost", "doubled", "errors", "changed", "orphans")]
        replaced = sum(int(trial["summary"]["num_replaced_replicas"]) for trial in some)
        restarts = sum(trial["driver_restarts"] for trial in some)
        strikes = sum(len(trial["struck"]) for trial in some)
        cells = [kind, len(some), strikes, restarts, replaced, arguments.num_rows, *sums]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


if __name__ == "__main__":
    main()
