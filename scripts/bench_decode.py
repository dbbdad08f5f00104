"""Decode step time of real vLLM with and without re-routing, on dummy weights and simulated routing.

    python scripts/bench_decode.py [--batches 1,8,16,32,64,128] [--variants 8,4,2,1] [--out docs/benchmarks/decode-...]

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
import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark import environment, integers, positive, report, report_path, spread, summary

GPU = torch.cuda.is_available()
# The V1 runner keeps its graphs where a variant's own set can be put in their place.
DEFAULTS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
SHAPES = {
    True: dict(hidden_size=2048, num_hidden_layers=48, num_experts=128, moe_intermediate_size=768, intermediate_size=6144,
               num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936, torch_dtype="bfloat16"),
    False: dict(hidden_size=512, num_hidden_layers=4, num_experts=64, moe_intermediate_size=1024, intermediate_size=1024,
                num_attention_heads=8, num_key_value_heads=2, head_dim=64, vocab_size=1024, torch_dtype="float32"),
}  # fmt: skip
TOP_K = 8
NO_PLUGIN = "no plugin"


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a large copy, the best of several."""
    source = torch.empty(1 << (30 if GPU else 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(12):
        synchronize()
        started = time.perf_counter()
        target.copy_(source)
        synchronize()
        best = max(best, 2 * source.numel() / (time.perf_counter() - started))
    return best


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def random_routing(top_k: int, num_experts: int) -> Callable:
    """Stands in for a router: softmax top-k of random logits, renormalised."""

    def compute(hidden_states: torch.Tensor, router_logits: torch.Tensor, indices_type: Any = None, **_: Any) -> Any:
        logits = torch.randn(hidden_states.shape[0], num_experts, device=hidden_states.device)
        if GPU:
            from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk

            return fused_topk(hidden_states, logits, top_k, True, indices_type=indices_type)[:2]
        weights, ids = logits.softmax(-1).topk(top_k)
        return weights / weights.sum(-1, keepdim=True), ids.to(indices_type or torch.int32)

    return compute


class Bench:
    """One engine and its variants."""

    def __init__(self, args: argparse.Namespace) -> None:
        from vllm import LLM

        from ops.vllm_plugin import register

        # Where the package is installed vLLM has done this; calling it again does nothing.
        register()
        self.batches, self.num_steps = args.batches, args.steps
        shape = {**SHAPES[GPU], **({"num_hidden_layers": args.layers} if args.layers else {})}
        self.shape = shape
        folder = Path(tempfile.mkdtemp(prefix="bench-decode-"))
        config = dict(
            **shape,
            architectures=["Qwen3MoeForCausalLM"],
            model_type="qwen3_moe",
            num_experts_per_tok=TOP_K,
            norm_topk_prob=True,
            max_position_embeddings=4096,
        )
        (folder / "config.json").write_text(json.dumps(config))
        device_settings = (
            dict(kv_cache_memory_bytes=8 << 30) if GPU else dict(kv_cache_memory_bytes=1 << 28, enforce_eager=True)
        )
        # Every batch that is timed is one that the plugin re-routes.
        sere = {"policy": "random", "primary_top_k": TOP_K, "min_tokens": 4, "max_tokens": max(1024, *args.batches)}
        compilation = dict(cudagraph_capture_sizes=sorted(args.batches)) if GPU else {}
        self.llm = LLM(
            model=str(folder),
            load_format="dummy",
            dtype=shape["torch_dtype"],
            skip_tokenizer_init=True,
            max_model_len=2048,
            max_num_seqs=max(args.batches),
            max_num_batched_tokens=max(8192 if GPU else 2048, max(args.batches) * 40),
            enable_prefix_caching=False,
            disable_log_stats=True,
            seed=0,
            compilation_config=compilation,
            additional_config={"sere": sere},
            **device_settings,
        )
        self.engine = self.llm.llm_engine
        core = self.engine.engine_core.engine_core
        self.runner = core.model_executor.driver_worker.worker.model_runner
        static = core.vllm_config.compilation_config.static_forward_context
        self.moe = [layer for layer in static.values() if hasattr(layer, "sere_layer")]
        self.device = self.moe[0].sere_layer.policy.layer.device
        self.counters: dict[str, torch.Tensor] = {}
        self.policies: dict[tuple[int, int], Any] = {}
        self.variants = [NO_PLUGIN, *(f"S={s}{counted}" for s in args.variants for counted in ("", " counted"))]
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.ids = itertools.count()
        self._graphs: dict[str, list] = {}

    def switch(self, variant: str) -> None:
        """Make the routers those of a variant. Takes effect at the next eager step, or at the next capture."""
        from ops.vllm_plugin import _follow

        routing = random_routing(TOP_K, self.shape["num_experts"])
        for number, runner in enumerate(self.moe):
            layer = runner.sere_layer
            if variant == NO_PLUGIN:
                runner.router._compute_routing = routing
                layer.policy, layer.counters = self.policy(layer, TOP_K), None
                continue
            runner.router._compute_routing = _follow(routing, runner)
            primary_top_k = int(variant.removeprefix("S=").split()[0])
            layer.policy = self.policy(layer, primary_top_k)
            layer._voting_top_k = primary_top_k
            layer.counters = self.counter(variant)[number] if variant.endswith("counted") else None

    def policy(self, layer: Any, primary_top_k: int) -> Any:
        from ops.policies import RandomPolicy

        info = layer.policy.layer
        key = (info.index, primary_top_k)
        if key not in self.policies:
            config = dataclasses.replace(layer.policy.config, primary_top_k=primary_top_k)
            self.policies[key] = RandomPolicy(config, info)
        return self.policies[key]

    def counter(self, variant: str) -> torch.Tensor:
        from ops.stats import COUNTERS

        if variant not in self.counters:
            self.counters[variant] = torch.zeros(len(self.moe), len(COUNTERS), dtype=torch.int64, device=self.device)
        return self.counters[variant]

    def check(self) -> None:
        """The layers re-route as the reference says, on inputs like those timed."""
        from ops.reference import reroute_reference

        layer = self.moe[0].sere_layer
        for primary_top_k in {int(name[2:].split()[0]) for name in self.variants[1:]}:
            self.switch(f"S={primary_top_k}")
            if not layer.has_work:
                continue
            # At least min_tokens, or the layers would leave the step alone.
            num_rows = max(8, *self.batches)
            layer.roles.fill(torch.arange(num_rows + 1, dtype=torch.int32, device=self.device))
            logits = torch.randn(num_rows, self.shape["num_experts"])
            weights, ids = logits.softmax(-1).topk(TOP_K)
            expected = reroute_reference(
                weights, ids, layer.policy.similarity.cpu(), primary_top_k=primary_top_k, threshold=layer.policy.threshold
            )
            _, actual = layer.route(weights.to(self.device), ids.to(self.device, torch.int32), logits.to(self.device))
            if not torch.equal(actual.cpu().long(), expected):
                raise SystemExit(f"S={primary_top_k} differs from the reference: no time is measured")

    def capture(self) -> None:
        """A set of CUDA graphs per variant: each wrapper's table of graphs, and the pool of memory they use."""
        if not GPU:
            return
        from vllm.compilation.cuda_graph import CUDAGraphWrapper
        from vllm.platforms import current_platform

        self.wrappers = list(CUDAGraphWrapper._all_instances)
        for variant in self.variants:
            pool = current_platform.graph_pool_handle()
            self._graphs[variant] = [({}, pool) for _ in self.wrappers]
            self.activate(variant)
            self.runner.capture_model()
            print(f"captured graphs for {variant}", flush=True)
        replay = torch.cuda.CUDAGraph.replay

        def timed(graph: torch.cuda.CUDAGraph) -> None:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            replay(graph)
            pair[1].record()
            self.events.append(pair)

        torch.cuda.CUDAGraph.replay = timed

    def activate(self, variant: str) -> None:
        self.switch(variant)
        if GPU:
            for wrapper, (entries, pool) in zip(self.wrappers, self._graphs[variant], strict=True):
                wrapper.concrete_cudagraph_entries, wrapper.graph_pool = entries, pool

    def decode(self, batch: int, num_tokens: int) -> dict[str, float]:
        """Milliseconds per step over the steps in which every sequence decodes: wall, and inside CUDA graphs."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        for sequence in range(batch):
            prompt = [(7919 * (sequence + 1) + 104729 * place) % (self.shape["vocab_size"] - 1) for place in range(16)]
            self.engine.add_request(f"r{next(self.ids)}", {"prompt_token_ids": prompt}, sampling)
        self.events.clear()
        synchronize()
        times, replays = [time.perf_counter()], [0]
        while self.engine.has_unfinished_requests():
            self.engine.step()
            times.append(time.perf_counter())
            replays.append(len(self.events))
        synchronize()
        begin, end = 4, len(times) - 3
        result = {"wall_ms": 1e3 * (times[end] - times[begin]) / (end - begin)}
        if GPU:
            per_step = (replays[end] - replays[begin]) / (end - begin)
            spent = statistics.median(a.elapsed_time(b) for a, b in self.events[replays[begin] : replays[end]])
            result |= {"gpu_ms": spent * per_step, "graphs_per_step": per_step}
        return result

    def active_experts(self, variant: str, batch: int) -> tuple[float, float]:
        """Active experts per layer and step, before and after re-routing."""
        from ops.stats import COUNTERS

        counters = self.counter(variant)
        counters.zero_()
        self.activate(variant)
        self.decode(batch, 12)
        total = dict(zip(COUNTERS, counters.sum(0).tolist(), strict=True))
        # Only steps without prompt rows.
        steps = max(1, total["steps"] - total["mixed_steps"])
        return tuple(
            (total[f"active_experts_{when}"] - total[f"mixed_active_experts_{when}"]) / steps for when in ("before", "after")
        )


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
