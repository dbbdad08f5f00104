"""Does the engine do what the emulation says? Policies in vLLM and emulated, on the same rows in the same batches.

    python scripts/benchmarks/bench_policies_engine.py --artifact runs/demo-moe/similarity.safetensors \
        --out docs/benchmarks/policies-engine

Every configuration is a `sere generate` job in static batches; its counters give the active experts, its answers the exact
matches. Losses are against the unmodified model in the same engine, with 95% intervals of the paired differences. What an
interrupted run has finished in --folder is not done again.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_policies import ROOT, Variant, figures_of_tasks, fresh_tasks, settings
from benchmark import environment, report, report_path

from sere.ops.engine.counters import read_counters


def variants(top_ks: list[float]) -> list[Variant]:
    names = ("sere", "oea", "sere_t rank 0", "sere_t rank 2")
    return [Variant(name, f"S={top_k:g}", settings(name, primary_top_k=top_k)) for name in names for top_k in top_ks]


def generate(folder: Path, data: Path, arguments: argparse.Namespace, reroute: dict[str, Any]) -> dict[str, Any]:
    """Run one job; its exact matches by row id, and its counters summed over layers."""
    import pyarrow.parquet as pq

    overrides = {
        "model": str(arguments.model),
        "data": str(data),
        "output": str(folder / "run"),
        "tracking.uri": "null",
        "batch_size": arguments.batch_size,
        "concurrent_batches": 1,
        "engine.max_num_seqs": arguments.batch_size,
        "engine.enforce_eager": str(not arguments.compiled).lower(),
        **{
            f"reroute.{key}": value if isinstance(value, (str, int, float)) else json.dumps(value)
            for key, value in reroute.items()
        },
        "reroute.stats_dir": str(folder / "counters"),
    }
    command = [sys.executable, "-m", "sere.pipeline.cli", "generate", str(ROOT / "conf/generate.yaml")]
    started = time.monotonic()
    subprocess.run([*command, *(f"{key}={value}" for key, value in overrides.items())], check=True, cwd=ROOT)
    rows = [row for file in sorted((folder / "run/results").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    counts: dict[str, int] = {}
    for replica in (folder / "counters").iterdir():
        for layer in read_counters(replica):
            for name, value in layer.counts.items():
                counts[name] = counts.get(name, 0) + value
    matches = {row["id"]: row["generated_text"] == row["reference"] for row in rows}
    return {"matches": matches, "counts": counts, "seconds": time.monotonic() - started}


def loss_of(found: dict[str, bool], base: dict[str, bool]) -> tuple[float, float, float]:
    """Loss in points with its 95% interval, over paired rows."""
    lost = torch.tensor([float(base[key]) - float(found[key]) for key in sorted(base)], dtype=torch.float64)
    width = 1.96 * lost.std().item() / math.sqrt(len(lost))
    return tuple(100 * (lost.mean().item() + shift) for shift in (0, -width, width))  # type: ignore[return-value]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "assets/demo-moe")
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--top-k", type=lambda text: [float(part) for part in text.split(",")], default=[2, 3])
    parser.add_argument("--only", default="", help="policies whose name contains this")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/policies-engine")
    parser.add_argument("--out", type=report_path)
    return parser.parse_args()


def main() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import vllm

    arguments = parse()
    chosen = [variant for variant in variants(arguments.top_k) if arguments.only in variant.family]
    rows = fresh_tasks(arguments.rows)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    data, other_order = (arguments.folder / f"{name}.parquet" for name in ("prompts", "other-order"))
    prompts = [{"id": f"{n:06d}", "prompt": p, "reference": a, "task": t} for n, (t, p, a) in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(prompts), data)
    pq.write_table(pa.Table.from_pylist(prompts[::-1]), other_order)
    emulated = figures_of_tasks(arguments.model, arguments.artifact, rows, chosen, batch_size=arguments.batch_size)
    base = generate(arguments.folder / "unmodified", data, arguments, {"policy": "none"})
    lines = [
        environment(f"vLLM {vllm.__version__}"),
        "",
        f"{len(rows)} rows, decode batch {arguments.batch_size}, static batches, "
        f"{'compiled' if arguments.compiled else 'eager'}. Unmodified: exact match in the engine "
        f"{sum(base['matches'].values()) / len(rows):.4f}, emulated {emulated[0]['exact_match']:.4f}; active experts "
        f"{_active(base['counts'], 'pure_', 'after'):.1f} and {emulated[0]['active']:.1f}.",
        "",
        "| policy | dial | active experts: engine, re-routing steps | emulated | engine, all steps "
        "| loss in points: engine (95%) | emulated (95%) |",
        "|---|---|---|---|---|---|---|",
    ]
    # The unmodified model with other rows beside each: what a difference of nothing looks like.
    null = generate(arguments.folder / "other-order", other_order, arguments, {"policy": "none"})
    loss, low, high = loss_of(null["matches"], base["matches"])
    actives = [_active(null["counts"], prefix, "after") for prefix in ("pure_", "")]
    lines.append(
        f"| unmodified, rows in reverse | | {actives[0]:.1f} | | {actives[1]:.1f} | {loss:.2f} [{low:.2f}, {high:.2f}] | |"
    )
    found = []
    for variant, expected in zip(chosen, emulated[1:], strict=True):
        values = variant.reroute.to_dict()
        reroute = {key: values[key] for key in ("policy", "primary_top_k", "threshold", "compensation")}
        reroute["similarity"] = str(arguments.artifact.absolute())
        name = f"{variant.family}-{variant.dial}".replace(" ", "-")
        run = generate(arguments.folder / name, data, arguments, reroute)
        loss, low, high = loss_of(run["matches"], base["matches"])
        active, everywhere = _active(run["counts"], "pure_", "after"), _active(run["counts"], "", "after")
        lines.append(
            f"| {variant.family} | {variant.dial} | {active:.1f} | {expected['active']:.1f} | {everywhere:.1f} "
            f"| {loss:.2f} [{low:.2f}, {high:.2f}] "
            f"| {expected['loss']:.2f} [{expected['loss_low']:.2f}, {expected['loss_high']:.2f}] |"
        )
        print(lines[-1], flush=True)
        found.append({"policy": variant.family, "dial": variant.dial, "active": active, "loss": [loss, low, high], **expected})
    report("Policies in the engine and emulated", lines, arguments.out, runs=found)


def _active(counts: dict[str, int], prefix: str, when: str) -> float:
    return counts[f"{prefix}active_experts_{when}"] / max(1, counts[f"{prefix}steps"])


if __name__ == "__main__":
    main()
