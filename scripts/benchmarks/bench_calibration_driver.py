"""What a calibration job costs its driver: bytes of sums that reach it, that it writes, reads and hashes, and its CPU time.

    python scripts/benchmarks/bench_calibration_driver.py [--before CHECKOUT] [--out docs/benchmarks/calibration_driver]

The whole job runs, over Ray, on 1,000 shards of the sums of a large model's layers. Only the workers are simulated: they have
no model, draw what experts put out, and pretend that a shard takes 20 seconds. With --before the job of another checkout is
measured as well; both must come to the same matrices before a number is reported.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from benchmark import environment, positive, report, report_path, spread, summary

from sere.calibration_jobs.metrics.base import SimilarityMetric
from sere.calibration_jobs.workers import results, runner, worker
from sere.calibration_jobs.workers.pool import WorkerPool
from sere.calibration_jobs.workers.results import Results
from sere.calibration_jobs.workers.worker import CalibrationWorker

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo-moe"
NUM_EXPERTS, SHARD_ROWS, SHARD_S, NUM_WORKERS = 128, 32, 20.0, 4
# Qwen3-235B-A22B.
LARGE_LAYERS = 94
# As of `sere.calibration_jobs.metrics.merge.InOrder`.
WAITING_BYTES = 2e9


class SimulatedWorker(CalibrationWorker):
    """Draws outputs of experts, the same for the same tokens; a shard takes as long as it is said to."""

    def ready(self) -> None:
        clock = [0.0]
        layers = range(int(os.environ["SERE_LAYERS"]))

        def observe_experts(_: Any, batches: list[dict[str, Any]], observe: Callable[..., None], **__: Any) -> None:
            tokens = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
            for layer in layers:
                generator = torch.Generator().manual_seed(int((tokens * torch.arange(len(tokens))).sum()) * 100 + layer)
                outputs = torch.randn(NUM_EXPERTS, len(tokens), 2, generator=generator)
                observe(layer, outputs, torch.arange(len(tokens)))
            clock[0] += SHARD_S

        def update(metric: SimilarityMetric, outputs: torch.Tensor) -> None:
            flat = outputs.flatten(1)[:, :64].double()
            metric.sums += flat @ flat.T
            metric.num_tokens += outputs.shape[1]

        worker.find_expert_modules = lambda _: dict.fromkeys(layers, SimpleNamespace(num_experts=NUM_EXPERTS))
        worker.observe_experts, SimilarityMetric.update = observe_experts, update
        worker.time = SimpleNamespace(monotonic=lambda: clock[0])
        self._model = None


def num_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def count_in_driver(counted: Counter[str]) -> None:
    """Have every way that sums go in the driver counted."""
    run, save, load, checksum = WorkerPool.run, Results.save, Results.load, results._checksum

    def counted_run(pool: WorkerPool, *arguments: Any) -> Iterator[Any]:
        for task, result in run(pool, *arguments):
            counted["reach it"] += num_bytes(result[0])
            yield task, result

    def counted_save(kept: Results, name: str, result: Any) -> None:
        counted["are written"] += num_bytes(result[0])
        counted["files"] += 1
        save(kept, name, result)

    def counted_load(kept: Results, name: str) -> Any:
        result = load(kept, name)
        counted["are read"] += num_bytes(result[0]) if result is not None else 0
        return result

    def counted_checksum(owner: str, name: str, tensors: Mapping[str, torch.Tensor], info: str) -> str:
        counted["are hashed"] += num_bytes(tensors)
        return checksum(owner, name, tensors, info)

    WorkerPool.run, Results.save, Results.load, results._checksum = counted_run, counted_save, counted_load, counted_checksum


def decide_as_for_all_layers(factor: float) -> None:
    """Have the number of groups, the time between checkpoints and the memory for what waits be those of the whole model."""
    from sere.calibration_jobs import job

    if hasattr(job, "most_groups"):  # not in earlier versions
        groups, interval = job.most_groups, job.checkpoint_interval
        job.most_groups = lambda size: groups(int(size * factor))
        job.checkpoint_interval = lambda size, num_workers: interval(int(size * factor), num_workers)
        job.InOrder = partial(job.InOrder, max_bytes=int(WAITING_BYTES / factor))


def make_inputs(folder: Path, *, num_layers: int, num_shards: int, num_domains: int) -> None:
    """A model that has layers and experts, but next to no weights, and rows of four tokens."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=258,
        hidden_size=8,
        intermediate_size=8,
        moe_intermediate_size=8,
        num_hidden_layers=num_layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=8,
        max_position_embeddings=128,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    transformers.AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder / "model")
    rows = [
        {"text": f"{number:06d}"[-4:], "domain": f"domain {number % num_domains}"} for number in range(num_shards * SHARD_ROWS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")


def measure(num_layers: int, num_shards: int, num_domains: int, repeats: int) -> list[dict[str, Any]]:
    """The whole job, several times, in this process: what was counted, seconds, and what tells whether matrices are alike."""
    from sere.calibration_jobs.job import calibrate
    from sere.conf.schema import CalibrateConfig, JudgeConfig, TrackingConfig
    from sere.pipeline.runtime.cluster import start_ray

    os.environ["SERE_LAYERS"] = str(num_layers)
    counted: Counter[str] = Counter()
    count_in_driver(counted)
    decide_as_for_all_layers(LARGE_LAYERS / num_layers)
    runner.CalibrationWorker = SimulatedWorker
    transformers.utils.logging.disable_progress_bar()
    start_ray(NUM_WORKERS, address=None)
    runs = []
    for _ in range(repeats):
        counted.clear()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            make_inputs(folder, num_layers=num_layers, num_shards=num_shards, num_domains=num_domains)
            config = CalibrateConfig(
                model=str(folder / "model"),
                data=str(folder / "rows.parquet"),
                output=str(folder / "similarity.safetensors"),
                domain_column="domain",
                metrics=("frobenius", "cosine", "cka"),
                tables=(),
                num_sequences=num_shards * SHARD_ROWS,
                shard_rows=SHARD_ROWS,
                num_workers=NUM_WORKERS,
                judge=JudgeConfig(held_out_rows=0),
                tracking=TrackingConfig(uri=""),
            )
            started, cpu = time.perf_counter(), time.process_time()
            calibrate(config)
            spent = {"cpu_s": time.process_time() - cpu, "elapsed_s": time.perf_counter() - started}
            runs.append({**spent, **what_is_left(folder), "files_written": counted["files"]})
        runs[-1]["bytes"] = {name: counted[name] for name in ("reach it", "are written", "are read", "are hashed")}
        runs[-1]["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return runs


def what_is_left(folder: Path) -> dict[str, Any]:
    """Of a finished job."""
    from sere.ops.similarity import SimilarityArtifact

    matrices = SimilarityArtifact.load(folder / "similarity.safetensors").matrices
    weights = torch.rand(NUM_EXPERTS, NUM_EXPERTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = [file.stat().st_size for file in (folder / "calibration" / "results").iterdir()]
    growth = json.loads((folder / "calibration" / "quality.json").read_text())["reliability"]
    return {
        "files_kept": len(kept),
        "bytes_kept": sum(kept),
        "growth_tokens": [step["num_tokens"] for step in growth],
        "matrices": {f"{layer}.{name}": float((matrix * weights).mean()) for (layer, name), matrix in matrices.items()},
    }


def in_a_process(checkout: Path, *arguments: int) -> list[dict[str, Any]]:
    """`measure` with the code of a checkout."""
    command = [sys.executable, __file__, "--measure", json.dumps(arguments)]
    environment_there = {**os.environ, "PYTHONPATH": str(checkout.resolve() / ".typing"), "RAY_USAGE_STATS_ENABLED": "0"}
    found = subprocess.run(command, env=environment_there, stdout=subprocess.PIPE, text=True)
    if found.returncode:
        sys.exit(f"the job of {checkout} failed")
    return json.loads(found.stdout.splitlines()[-1])


def bytes_table(raw: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> list[str]:
    """What went where, as it was measured (the most of all runs) and for all layers of a large model."""
    factor, one = LARGE_LAYERS / args.layers, 3 * 8 * NUM_EXPERTS**2 / 1e6
    names = list(next(iter(raw.values()))[0]["bytes"])
    lines = [
        f"{args.shards:,} shards of {SHARD_S:.0f} seconds, {NUM_WORKERS} simulated workers, {args.layers} layers of",
        f"{NUM_EXPERTS} experts, three metrics, no tables. A layer's sums are 3 x 8 x {NUM_EXPERTS}^2 bytes = {one:.2f} MB,",
        "and as much again for each of several domains. Sums are proportional to layers: the right half of the",
        f"table is the left one times {LARGE_LAYERS} / {args.layers}, for the {LARGE_LAYERS} layers of Qwen3-235B-A22B.",
        "",
        f"| domains | job | {' | '.join(names + names)} |",
        "|---:|---|" + "---:|" * 8,
    ]
    for key, runs in raw.items():
        values = [max(found["bytes"][name] for found in runs) / 1e9 for name in names]
        cells = [f"{value:.2f} GB" for value in values] + [f"{value * factor:.1f} GB" for value in values]
        lines.append(f"| {key.replace(' ', ' | ')} | {' | '.join(cells)} |")
    return lines


def rest_table(raw: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The rest of what was measured, of the job as it ran."""
    lines = [
        "The job as it ran, with the driver's CPU time, of which reading the text and making the matrices is a part.",
        f"Median of {len(next(iter(raw.values())))} runs (20th to 80th percentile). Files that are not kept are checkpoints.",
        "",
        "| domains | job | files written | files kept | CPU, s | elapsed, s | memory at most, MiB |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for key, runs in raw.items():
        cells = [f"{runs[0]['files_written']:,}", f"{runs[0]['files_kept']:,} ({runs[0]['bytes_kept'] / 1e9:.2f} GB)"]
        cells += [spread(summary([found[name] for found in runs]), 1) for name in ("cpu_s", "elapsed_s")]
        cells += [f"{max(found['peak_mib'] for found in runs):,.0f}"]
        lines.append(f"| {key.replace(' ', ' | ')} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "Not measured: tables. With all of them a result of that model is 1.3 GB: 64 are 83 GB, where 1,000 would be 1.3 TB.",
        "Of those that arrive before their turn one waits in memory, and others are read again, once.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--shards", type=positive, default=1000)
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--before", type=Path, help="another checkout, whose job is measured, too")
    parser.add_argument("--out", type=report_path, help="write PATH.md and PATH.json")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*json.loads(args.measure))))
        return
    checkouts = {"before": args.before} if args.before else {}
    checkouts["now"] = Path(__file__).resolve().parents[2]
    raw = {
        f"{num_domains} {name}": in_a_process(checkout, args.layers, args.shards, num_domains, args.repeats)
        for num_domains in (1, 4)
        for name, checkout in checkouts.items()
    }
    for num_domains in (1, 4):
        first, *others = (found["matrices"] for name in checkouts for found in raw[f"{num_domains} {name}"])
        if any(abs(value - other[key]) > 1e-6 for other in others for key, value in first.items()):
            sys.exit("two jobs come to different matrices")
    lines = [*bytes_table(raw, args), "", *rest_table(raw)]
    where = environment(f"transformers {transformers.__version__}")
    if args.before:
        command = ["git", "-C", str(args.before), "rev-parse", "--short", "HEAD"]
        where += f" (before: {subprocess.run(command, capture_output=True, text=True).stdout.strip()})"
    report("What a calibration job costs its driver", [where, "", *lines], args.out, environment=where, results=raw)


if __name__ == "__main__":
    main()
