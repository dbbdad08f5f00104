"""What a large job costs its driver: CPU seconds, memory and objects, with engines that answer at once.

    python scripts/benchmarks/bench_scale.py --sizes 100000,1000000,10000000 --s3 100000,1000000 --out docs/benchmarks/scale

Everything is real but the engines: Ray Data reads, references go to replica actors, those write parts, the driver counts them,
makes large files of small ones and declares the job finished. Each job is killed (kill -9) at half of its rows and started
again, so that resuming is measured too. CPU seconds of the driver say more than a busy machine's clock does.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from benchmark import environment, integers, positive, report, report_path
from object_store import BUCKET, object_store, options_of
from simulated_engine import simulate_engines

from sere.pipeline.runtime.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
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


def drive(figures: Path, settings: list[str]) -> None:
    """One session of the job, in a process of its own; writes what its steps cost."""
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
    config = load_config(GenerateConfig, str(ROOT / "conf/generate.yaml"), settings)
    begun, started = time.process_time(), time.monotonic()
    driver.generate(config)
    figures.write_text(
        json.dumps(
            {
                "elapsed_s": time.monotonic() - started,
                "to_begin_s": marks.get("before_work", marks["before_finish"]) - begun,
                "to_work_s": marks.get("after_work", 0.0) - marks.get("before_work", 0.0),
                "to_finish_s": marks["after_finish"] - marks["before_finish"],
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )
    )


def rows_in_parts(storage: Storage) -> tuple[int, int]:
    """Rows that are written, and the number of files that hold them."""
    rows, names = 0, list(storage.sizes("results"))
    for name in names:
        with storage.filesystem.open(storage.locate(name), "rb", cache_type="none") as opened:
            rows += pq.read_metadata(opened).num_rows
    return rows, len(names)


def measure(folder: Path, num_rows: int, output: str, options: dict[str, Any], num_replicas: int) -> dict[str, Any]:
    """A job that is killed at half, and the one that goes on with it."""
    data, storage = make_data(folder / "data", num_rows), Storage(output, options)
    settings = [f"data={data}", f"output={output}", f"model={ROOT / 'assets/demo-moe'}", "tracking.uri=null", "reroute=null"]
    settings += [f"engine.num_replicas={num_replicas}", "engine.cpus_per_replica=0.01", "preserve_order=false"]
    settings += ["batch_size=64", "concurrent_batches=8", f"storage_options={json.dumps(options)}"]
    if num_rows <= 1_000_000:
        # Such a job ends within a minute or two.
        settings += ["checkpoint_interval_s=5"]
    figures = folder / "figures.json"
    command = [sys.executable, __file__, "--drive", str(figures), *settings]
    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    kept = peak = 0
    while kept < num_rows / 2 and first.poll() is None:
        time.sleep(2)
        kept, num_parts = rows_in_parts(storage)
        peak = max(peak, num_parts)
    if first.poll() is None:
        os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    time.sleep(20)
    kept, _ = rows_in_parts(storage)
    subprocess.run(command, cwd=ROOT, check=True)
    found = json.loads(figures.read_text())
    rows, num_parts = rows_in_parts(storage)
    manifest = storage.get_json("manifest.json")
    assert rows == num_rows == manifest["metrics"]["num_rows"], f"{rows} of {num_rows} rows"
    assert set(manifest["files"]) == set(storage.sizes("results"))
    num_objects = len(storage.filesystem.find(storage.path))
    where = "local" if storage.is_local else "S3"
    return {"where": where, "num_rows": num_rows, "kept": kept, "parts_at_half": peak, "objects": num_objects, **found}


def main() -> None:
    if sys.argv[1:2] == ["--drive"]:
        drive(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=integers, default=[100_000, 1_000_000], help="rows of jobs on the local disk")
    parser.add_argument("--s3", type=integers, default=[], help="rows of jobs on an S3 server on this machine")
    parser.add_argument("--replicas", type=positive, default=16, help="replica processes (default: 16)")
    parser.add_argument("--out", type=report_path, help="write OUT.md and OUT.json")
    arguments = parser.parse_args()
    results = []
    for is_local, sizes in ((True, arguments.sizes), (False, arguments.s3)):
        for size in sizes:
            with tempfile.TemporaryDirectory(prefix="sere-scale-") as scratch, ExitStack() as stack:
                options = {} if is_local else options_of(stack.enter_context(object_store()))
                output = f"{scratch}/run" if is_local else f"s3://{BUCKET}/run"
                results.append(measure(Path(scratch), size, output, options, arguments.replicas))
            print(json.dumps(results[-1]), flush=True)
    report("What a large job costs its driver", table(results, arguments.replicas), arguments.out, results=results)


def table(results: list[dict[str, Any]], num_replicas: int) -> list[str]:
    """The report's lines."""
    lines = [
        environment(),
        "",
        f"{num_replicas} replica processes with engines that answer at once, batch_size 64, concurrent_batches 8, rows of "
        "about 100 bytes. CPU seconds and memory are those of the driver of the second session, which finds what the first "
        "had written when it was killed at half.",
        "",
        "| results on | rows | found finished | CPU s to resume (describe, scan) | CPU s per million rows handed out | "
        "CPU s to finish | peak memory, GiB | parts when killed | objects at the end |",
        "|---" * 9 + "|",
    ]
    for row in results:
        done = max(1, row["num_rows"] - row["kept"])
        lines.append(
            f"| {row['where']} | {row['num_rows']:,} | {row['kept']:,} | {row['to_begin_s']:.1f} | "
            f"{row['to_work_s'] / done * 1e6:.0f} | {row['to_finish_s']:.1f} | {row['peak_gib']:.2f} | "
            f"{row['parts_at_half']} | {row['objects']} |"
        )
    return lines


if __name__ == "__main__":
    main()
