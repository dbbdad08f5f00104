"""The engine that `bench_decode.py` times: one set of dummy weights, whose routing and CUDA graphs switch between variants."""

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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

        from sere.ops.engine.plugin import register

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
        from sere.ops.engine.plugin import _follow

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
            layer.counters = self.counter(variant)[number] if variant.endswith("counted") else None

    def policy(self, layer: Any, primary_top_k: int) -> Any:
        from sere.ops.policies.policy import Policy

        info = layer.policy.layer
        key = (info.index, primary_top_k)
        if key not in self.policies:
            config = dataclasses.replace(layer.policy.config, primary_top_k=primary_top_k)
            self.policies[key] = Policy(config, info)
        return self.policies[key]

    def counter(self, variant: str) -> torch.Tensor:
        from sere.ops.kernels.counting import COUNTERS

        if variant not in self.counters:
            self.counters[variant] = torch.zeros(len(self.moe), len(COUNTERS), dtype=torch.int64, device=self.device)
        return self.counters[variant]

    def check(self) -> None:
        """The layers re-route as the reference says, on inputs like those timed."""
        from sere.ops.reference import reroute_reference

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
                weights, ids, layer.policy.similarity.cpu(), primary_top_k=primary_top_k, threshold=0.0
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
        from sere.ops.kernels.counting import COUNTERS

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
