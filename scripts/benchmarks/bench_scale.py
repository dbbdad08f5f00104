"""What a large job costs its driver: CPU seconds, memory and objects, with engines that answer at once.

    python scripts/benchmarks/bench_scale.py --sizes 100000,1000000 --out docs/benchmarks/scale

Everything is real but the engines: Ray Data reads, references go to replica actors, those write parts, the driver counts and
declares the job finished. Each job is killed (kill -9) at half of its rows and started again, so that resuming is measured too.
CPU seconds say more than a busy machine's clock does.
"""

import argparse
import json
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from benchmark import environment, integers, positive, report, report_path
from simulated_engine import simulate_engines

ROOT = Path(__file__).resolve().parents[2]
ROWS_PER_FILE = 250_000
_TEXT = f"{'what a prompt of about ninety letters may look like, said at some length':80}"


def make_data(folder: Path, num_rows: int) -> Path:
    """Rows of about 100 bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, num_rows, ROWS_PER_FILE):
        numbers = range(start, min(start + ROWS_PER_FILE, num_rows))
        prompts = [f"{number:010d} {_TEXT}" for number in numbers]
        table = pa.table({"id": [str(number) for number in numbers], "prompt": prompts})
        pq.write_table(table, folder / f"{start:010d}.parquet")
    return folder


def drive(arguments: argparse.Namespace) -> None:
    """One session of the job, in a process of its own; prints what its steps cost."""
    from sere.conf.load import load_config
    from sere.conf.schema import GenerateConfig
    from sere.pipeline.generate import driver

    simulate_engines()
    marks: dict[str, float] = {}
    work, finish = driver._work, driver.finish

    def marked(name: str, step: Any) -> Any:
        def run(*given: Any, **options: Any) -> Any:
            marks[f"before_{name}"] = time.process_time()
            found = step(*given, **options)
            marks[f"after_{name}"] = time.process_time()
            return found

        return run

    driver._work, driver.finish = marked("work", work), marked("finish", finish)
    config = load_config(
        GenerateConfig,
        str(ROOT / "conf/generate.yaml"),
        [
            f"data={arguments.data}",
            f"output={arguments.output}",
            "tracking.uri=null",
            "reroute=null",
            f"engine.num_replicas={arguments.replicas}",
            "engine.cpus_per_replica=0.01",
            f"checkpoint_rows={arguments.checkpoint_rows}",
            f"model={ROOT / 'assets/demo-moe'}",
        ],
    )
    begun, started = time.process_time(), time.monotonic()
    driver.generate(config)
    print(
        json.dumps(
            {
                "seconds": time.monotonic() - started,
                "to_begin": marks.get("before_work", marks["before_finish"]) - begun,
                "to_work": marks.get("after_work", 0.0) - marks.get("before_work", 0.0),
                "to_finish": marks["after_finish"] - marks["before_finish"],
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )
    )


def measure(folder: Path, num_rows: int, arguments: argparse.Namespace) -> dict[str, float]:
    """A job that is killed at half, and the one that goes on with it."""
    data, output = make_data(folder / "data", num_rows), folder / "run"
    command = [sys.executable, __file__, "--drive", "--data", str(data), "--output", str(output)]
    command += ["--replicas", str(arguments.replicas), "--checkpoint-rows", str(arguments.checkpoint_rows)]
    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    while first.poll() is None and sum(1 for _ in output.glob("results/*")) * arguments.checkpoint_rows < num_rows:
        time.sleep(0.2)
    kept = sum(pq.read_metadata(file).num_rows for file in output.glob("results/part-*.parquet"))
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(5)
    second = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(second.stdout.splitlines()[-1])
    files = [path for path in output.rglob("*") if path.is_file()]
    manifest = json.loads((output / "manifest.json").read_text())
    rows = sum(pq.read_metadata(output / name).num_rows for name in manifest["files"])
    assert rows == num_rows == manifest["metrics"]["num_rows"], f"{rows} of {num_rows} rows"
    return {"num_rows": num_rows, "kept": kept, "objects": len(files), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=integers, default=[100_000, 1_000_000], help="rows of the jobs (default: 100000,1000000)"
    )
    parser.add_argument("--replicas", type=positive, default=4, help="replica processes (default: 4)")
    parser.add_argument("--checkpoint-rows", type=positive, default=8192, help="as in conf/generate.yaml (default: 8192)")
    parser.add_argument("--out", type=report_path, help="write OUT.md and OUT.json")
    parser.add_argument("--drive", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        drive(arguments)
        return
    results = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(prefix="sere-scale-") as scratch:
            results.append(measure(Path(scratch), size, arguments))
            shutil.rmtree(Path(scratch) / "data", ignore_errors=True)
        print(results[-1], flush=True)
    lines = [
        environment(),
        "",
        f"{arguments.replicas} replicas with engines that answer at once, batch_size 64; the driver of the second session, "
        "which finds half of the rows finished.",
        "",
        "| rows | found finished | CPU s to begin (describe, scan) | CPU s per million rows handed out | CPU s to finish | "
        "peak memory of the driver, GiB | files |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results:
        done = max(1, row["num_rows"] - row["kept"])
        lines.append(
            f"| {row['num_rows']:,} | {row['kept']:,} | {row['to_begin']:.1f} | {row['to_work'] / done * 1e6:.0f} | "
            f"{row['to_finish']:.1f} | {row['peak_gib']:.2f} | {row['objects']} |"
        )
    report("What a large job costs its driver", lines, arguments.out, results=results)


if __name__ == "__main__":
    main()
