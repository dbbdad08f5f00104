"""Decode step time of real vLLM with and without re-routing, on dummy weights and simulated routing.

    python scripts/benchmarks/bench_decode.py [--batches 1,8,16,32,64] [--variants 8,4,2,1] [--out docs/benchmarks/decode-...]

On a GPU: the shape of Qwen3-30B-A3B in bfloat16, torch.compile and CUDA graphs on. On a CPU: a small shape in float32, eager.
One engine and one set of weights for all variants, timed in turn, so that they differ in routing alone; on a GPU each variant
has its own CUDA graphs. If capturing several sets fails, give one variant at a time.

Variants: the routers without the plugin; then, for each S, the plugin with primary_top_k = S (at S = top_k it has nothing to
do), and the same with counters. The policy is `random`, with its seeded similarity and threshold 0: the code path of `sere`
without an artifact, re-routing all it can. Routing is the softmax top-k of random logits: as spread out
as it can be. Weights are dummies, so this says nothing about quality: the demo does (docs/benchmarks/demo-quality.md).

A step's time on a GPU is that inside its CUDA graphs. The one launch per step that sets the rows' roles comes before them: it
is in the wall time only.
"""

import argparse
import itertools
import os
import time

from benchmark import environment, integers, positive, report, report_path, spread, summary
from decode_engine import DEFAULTS, GPU, NO_PLUGIN, TOP_K, Bench, copy_bandwidth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=integers, default=[1, 8, 16, 32, 64, 128] if GPU else [1, 8, 32])
    parser.add_argument("--variants", type=integers, default=[8, 4, 2, 1], help="values of S")
    parser.add_argument("--layers", type=positive, help="fewer layers than the shape has")
    parser.add_argument("--steps", type=positive, default=64 if GPU else 24, help="tokens per sequence")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--budget-s", type=float, default=420, help="start no further repetition after this time")
    parser.add_argument("--out", type=report_path, help="write OUT.json and OUT.md")
    args = parser.parse_args()
    if max(args.variants) > TOP_K:
        parser.error(f"--variants: S is at most top_k, {TOP_K}, got {max(args.variants)}")
    if args.steps < 12:
        parser.error(f"--steps: at least 12, as the first and last few are not measured, got {args.steps}")
    started = time.monotonic()
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)

    bandwidth = copy_bandwidth("cuda" if GPU else "cpu")
    bench = Bench(args)
    bench.check()
    bench.capture()
    for variant in bench.variants:
        bench.activate(variant)
        for batch in args.batches:
            bench.decode(batch, 12)
    active = {
        (variant, batch): bench.active_experts(f"{variant} counted", batch)
        for variant in bench.variants
        if variant != NO_PLUGIN and not variant.endswith("counted")
        for batch in args.batches
    }
    times: dict[tuple[str, int], list[dict[str, float]]] = {}
    for repeat in range(args.repeats):
        if repeat and time.monotonic() - started > args.budget_s:
            print(f"out of time after {repeat} repetitions")
            break
        for batch, variant in itertools.product(args.batches, bench.variants):
            bench.activate(variant)
            times.setdefault((variant, batch), []).append(bench.decode(batch, args.steps))

    import vllm

    shape = bench.shape
    expert_bytes = 3 * shape["hidden_size"] * shape["moe_intermediate_size"] * (2 if shape["torch_dtype"] == "bfloat16" else 4)
    clock = "gpu_ms" if GPU else "wall_ms"
    rows = []
    for batch, variant in itertools.product(args.batches, bench.variants):
        runs = times[variant, batch]
        row = {"batch": batch, "variant": variant, "runs": runs}
        row |= {name: summary([run[name] for run in runs]) for name in runs[0] if name.endswith("_ms")}
        paired = [base[clock] / run[clock] for base, run in zip(times[NO_PLUGIN, batch], runs, strict=True)]
        row["speed_up"] = summary(paired)
        if variant != NO_PLUGIN:
            before, after = active[variant.removesuffix(" counted"), batch]
            baseline_ms = summary([run[clock] for run in times[NO_PLUGIN, batch]])["median"]
            saved_ms = 1e3 * len(bench.moe) * (before - after) * expert_bytes / bandwidth
            row |= {"active_before": before, "active_after": after, "roofline_speed_up": baseline_ms / (baseline_ms - saved_ms)}
        rows.append(row)

    machine = environment(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s", f"vLLM {vllm.__version__}")
    sizes = ", ".join(f"{key} {value}" for key, value in shape.items())
    lines = [
        machine,
        "",
        f"Shape: {sizes}, top-{TOP_K}. {args.steps} tokens per sequence, {len(times[NO_PLUGIN, args.batches[0]])} repetitions.",
        f"Step: {'inside CUDA graphs (wall time in brackets)' if GPU else 'wall time'}, median (p20 to p80), milliseconds.",
        *(["The launch per step that sets the rows' roles is outside the graphs, so in the wall time only."] if GPU else []),
        "Speed-up: against no plugin in the same repetition. Roofline: what the bytes of the experts saved would give.",
        "",
        "| batch | variant | active experts | step, ms | speed-up (p20 to p80) | roofline | share of it |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        step, speed = row[clock], row["speed_up"]
        experts = f"{row['active_before']:.1f} -> {row['active_after']:.1f}" if "active_before" in row else ""
        roofline = f"{row['roofline_speed_up']:.2f}x" if "roofline_speed_up" in row else ""
        share = f"{speed['median'] / row['roofline_speed_up']:.0%}" if "roofline_speed_up" in row else ""
        wall = f" [{row['wall_ms']['median']:.2f}]" if GPU else ""
        lines.append(
            f"| {row['batch']} | {row['variant']} | {experts} "
            f"| {spread(step)}{wall} | {spread(speed, 3)} | {roofline} | {share} |"
        )
    report("Decode steps", lines, args.out, environment=machine, shape=shape, rows=rows)
    # Ending the engine politely takes longer than the operating system needs.
    os._exit(0)


if __name__ == "__main__":
    main()
