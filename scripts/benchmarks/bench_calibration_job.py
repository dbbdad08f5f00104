"""Where a calibration worker's time goes, what memory it takes, and what reading weights from disk costs.

    python scripts/benchmarks/bench_calibration_job.py [--out docs/benchmarks/calibration-job-cpu]

Time: the model's own forward pass, all experts on all tokens, and each metric, on the demo model and on a wider random one.
Memory: the most a worker process held, against the tokens it saw. Disk: a random model whose weights exceed the memory given to
them, against the same model in memory, by rows per forward pass. The sums must agree before a time is reported.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from benchmark import environment, positive, report, report_path, spread, summary

from sere.calibration_jobs.capture.batches import pad_rows
from sere.calibration_jobs.capture.experts import Observer, observe_experts
from sere.calibration_jobs.metrics import METRIC_CLASSES
from sere.calibration_jobs.metrics.base import ShardSums, SimilarityMetric
from sere.calibration_jobs.shards import TokenRow
from sere.calibration_jobs.workers.worker import CalibrationWorker
from sere.conf.schema import CalibrateConfig, JudgeConfig

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo-moe"
BLOCK_TOKENS = 256


def token_rows(num_rows: int, length: int) -> list[TokenRow]:
    generator = torch.Generator().manual_seed(0)
    return [TokenRow(tuple(row), "") for row in torch.randint(2, 258, (num_rows, length), generator=generator).tolist()]


def random_model(folder: Path, *, num_layers: int, hidden_size: int, intermediate_size: int, num_experts: int) -> int:
    """Save a Qwen3-MoE with random weights; returns their bytes in float32."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=258,
        hidden_size=hidden_size,
        intermediate_size=64,
        moe_intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=hidden_size // 8,
        num_experts=num_experts,
        num_experts_per_tok=8,
        max_position_embeddings=256,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() * 4 for parameter in model.parameters())


def timed_metrics(num_experts: int, spent: dict[str, float]) -> Observer:
    """An observer that updates all metrics and adds up the seconds of each."""
    sums: dict[tuple[int, str], SimilarityMetric] = {}

    def observe(layer: int, outputs: torch.Tensor, _: torch.Tensor) -> None:
        for name, metric in METRIC_CLASSES.items():
            own = sums.setdefault((layer, name), metric(num_experts))
            started = time.perf_counter()
            own.update(outputs)
            spent[name] += time.perf_counter() - started

    return observe


def profile(folder: Path, num_rows: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of every part, by repeat, after one that warms up."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_experts_implementation("grouped_mm")
    num_experts, batch = model.config.num_experts, pad_rows([row.tokens for row in token_rows(num_rows, 128)])
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats + 1):
        started = time.perf_counter()
        with torch.inference_mode():
            model(**batch, use_cache=False, logits_to_keep=1)
        spent = {"model's forward": time.perf_counter() - started, "all experts": 0.0}
        spent |= dict.fromkeys(METRIC_CLASSES, 0.0)
        observe = timed_metrics(num_experts, spent)
        started = time.perf_counter()
        observe_experts(model, [batch], observe, block_tokens=BLOCK_TOKENS)
        spent["all experts"] = time.perf_counter() - started - sum(spent.values())
        for name, seconds in spent.items():
            found[name].append(seconds)
    return {name: seconds[1:] for name, seconds in found.items()}


def run_worker(folder: str, max_memory_gib: float | None, num_rows: int, batch_size: int) -> dict[str, float]:
    """One worker on so many rows of 128 tokens, in this process."""
    judge = JudgeConfig(held_out_rows=0)
    config = CalibrateConfig(
        model=folder, data="-", output="-", max_memory_gib=max_memory_gib, batch_size=batch_size, judge=judge
    )
    worker = CalibrationWorker(config, BLOCK_TOKENS)
    worker.ready()
    (result,) = worker.sums([token_rows(num_rows, 128)], ("",))
    found = ShardSums.from_result(result)
    total = sum(float(tensor.sum()) for tensor in found.sums.values())
    return {"seconds": found.elapsed_s, "peak_mib": found.peak_memory_bytes / 2**20, "total": total}


def in_a_process(*arguments: object) -> dict[str, float]:
    """`run_worker` in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--worker", json.dumps(arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--out", type=report_path, help="write PATH.md and PATH.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(run_worker(*json.loads(args.worker))))
        return
    transformers.utils.logging.disable_progress_bar()
    raw: dict[str, object] = {}
    lines = [
        "## Time of 2,048 tokens",
        "",
        "| model | part | seconds | share |",
        "|---|---|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        wide, deep = Path(scratch) / "wide", Path(scratch) / "deep"
        random_model(wide, num_layers=1, hidden_size=1024, intermediate_size=512, num_experts=64)
        for name, folder in (("demo: 64 experts, 128 x 64", DEMO), ("random: 64 experts, 1024 x 512, one layer", wide)):
            parts = raw[name] = profile(folder, 16, args.repeats)
            whole = sum(summary(seconds)["median"] for seconds in parts.values())
            for part, figures in ((part, summary(seconds)) for part, seconds in parts.items()):
                lines.append(f"| {name} | {part} | {spread(figures)} | {figures['median'] / whole:.0%} |")
        lines += ["", "## Peak memory of a worker (demo model)", "", "| tokens | resident at most, MiB |", "|---:|---:|"]
        raw["memory"] = {}
        for num_rows in (8, 32, 128, 512):
            peak = raw["memory"][num_rows * 128] = in_a_process(str(DEMO), None, num_rows, 8)["peak_mib"]
            lines.append(f"| {num_rows * 128:,} | {peak:.0f} |")
        num_bytes = random_model(deep, num_layers=12, hidden_size=256, intermediate_size=168, num_experts=32)
        lines += [
            "",
            f"## Weights on disk: {num_bytes / 1e6:.0f} MB of weights, 32 MB of memory for them",
            "",
            "Time of 64 rows of 128 tokens, against the same model in memory. The files were in the page cache: a slower disk",
            "costs more, and gains more from larger batches.",
            "",
            "| rows per forward pass | in memory, s | from disk, s | ratio |",
            "|---:|---:|---:|---:|",
        ]
        raw["disk"] = []
        for batch_size in (1, 4, 16, 64):
            inside, outside = (in_a_process(str(deep), limit, 64, batch_size) for limit in (None, 0.03))
            if abs(inside["total"] - outside["total"]) > 1e-6 * abs(inside["total"]):
                sys.exit(f"sums differ: {inside['total']} in memory, {outside['total']} from disk")
            raw["disk"].append({"batch_size": batch_size, "inside": inside, "outside": outside})
            ratio = outside["seconds"] / inside["seconds"]
            lines.append(f"| {batch_size} | {inside['seconds']:.1f} | {outside['seconds']:.1f} | {ratio:.2f} |")
    where = environment(f"transformers {transformers.__version__}")
    report("Time and memory of a calibration worker", [where, "", *lines], args.out, environment=where, results=raw)


if __name__ == "__main__":
    main()
