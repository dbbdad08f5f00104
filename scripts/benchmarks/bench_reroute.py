"""Time of re-routing one step of one layer, on a GPU or on the CPU.

    python scripts/benchmarks/bench_reroute.py [--out docs/benchmarks/reroute-...]

On a GPU: time per launch inside a CUDA graph of 48 launches (48 layers, each with its own inputs and similarity), for a grid of
step sizes and layer shapes, beside an empty kernel (what any launch costs) and beside the paper's recipe in torch operations;
and time of own targets (policy oea), which change weights in place and so are timed with two copies, beside those alone.
On the CPU: one step, beside the experts of the layer it belongs to, as Transformers computes them in float32.

Nothing is timed whose result on the very inputs it is timed with, of all layers, differs from the reference.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmark import environment, positive, report, report_path, spread, summary
from torch import Tensor

from sere.conf.schema import RerouteConfig
from sere.ops import reroute_topk
from sere.ops.kernels.counting import COUNTERS
from sere.ops.policies.policy import LayerInfo, Policy
from sere.ops.policies.scoring import Scoring
from sere.ops.reference import DECODE, reroute_reference

NUM_LAYERS = 48
SHAPES = [(60, 4), (64, 6), (128, 8), (256, 8), (512, 10)]
NUM_TOKENS = [1, 8, 16, 32, 64, 128, 256]
THRESHOLD = 0.5


def draw(num_tokens: int, num_experts: int, top_k: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, ids, similarity and logits of a step: softmax top-k of random logits, a drawn symmetric matrix."""
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    weights, ids = logits.softmax(-1).topk(top_k)
    similarity = torch.rand(num_experts, num_experts, generator=generator)
    similarity = torch.maximum(similarity, similarity.T).fill_diagonal_(1)
    return weights / weights.sum(-1, keepdim=True), ids.int(), similarity, logits


def recipe(weights: Tensor, ids: Tensor, similarity: Tensor, primary_top_k: int) -> Tensor:
    """The paper's steps in torch operations: clear a mask, scatter, masked argmax, gather, casts. Slots must be sorted."""
    num_experts = similarity.shape[0]
    mask = torch.zeros(num_experts, dtype=torch.bool, device=ids.device)
    mask.scatter_(0, ids[:, :primary_top_k].flatten().long(), True)
    best, replacement = similarity.masked_fill(~mask, -1).max(dim=1)
    own = torch.arange(num_experts, device=ids.device)
    table = torch.where(mask | (best < THRESHOLD), own, replacement)
    return table[ids.long()].int()


def time_graph(body: Callable[[], None], repeats: int) -> dict[str, float]:
    """Microseconds per layer of `body`, which handles all layers, inside a CUDA graph."""
    body()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    times = []
    for repeat in range(repeats + 10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if repeat >= 10:
            times.append(start.elapsed_time(end) * 1e3 / NUM_LAYERS)
    return summary(times)


def empty_kernel(device: torch.device) -> Callable[[], None]:
    """Launches of a kernel that does nothing, through the same code as the real one's."""
    import cupy

    from sere.ops.kernels.compile import cupy_stream

    function = cupy.RawModule(code='extern "C" __global__ void empty() {}').get_function("empty")

    def launch() -> None:
        with cupy_stream(cupy, device.index):
            for _ in range(NUM_LAYERS):
                function((1,), (32,), ())

    return launch


def bench_shape(
    num_tokens: int, num_experts: int, top_k: int, primary_top_k: int, *, device: torch.device, repeats: int
) -> dict[str, Any]:
    """The kernel, the kernel with counters, and the recipe, on the same inputs."""
    from sere.ops.kernels import cuda
    from sere.ops.kernels.neighbours import sorted_neighbours

    generator = torch.Generator().manual_seed(num_tokens)
    layers = [draw(num_tokens, num_experts, top_k, generator) for _ in range(NUM_LAYERS)]
    weights, ids, similarity, logits = ([tensor.to(device) for tensor in kind] for kind in zip(*layers, strict=True))
    neighbours = [sorted_neighbours(matrix, THRESHOLD) for matrix in similarity]
    new_ids = [torch.empty_like(tensor) for tensor in ids]
    recipe_ids: list[Tensor | None] = [None] * NUM_LAYERS
    roles = torch.full((num_tokens,), DECODE, dtype=torch.int8, device=device)
    step = torch.tensor([num_tokens, num_tokens, 1], device=device)
    counters = torch.zeros(NUM_LAYERS, len(COUNTERS), dtype=torch.int64, device=device)

    def launch(counted: bool) -> None:
        for layer in range(NUM_LAYERS):
            cuda.reroute(
                weights[layer],
                ids[layer],
                neighbours[layer],
                num_experts=num_experts,
                primary_top_k=primary_top_k,
                new_ids=new_ids[layer],
                roles=roles,
                step=step,
                counters=counters[layer] if counted else None,
            )

    def run_recipe() -> None:
        for layer in range(NUM_LAYERS):
            recipe_ids[layer] = recipe(weights[layer], ids[layer], similarity[layer], primary_top_k)

    info = dict(index=0, num_experts=num_experts, top_k=top_k, renormalize=True, scoring=Scoring(function="softmax"))
    oea = RerouteConfig(policy="oea", primary_top_k=primary_top_k)
    own = Policy(oea, LayerInfo(device=device, **info))
    own_weights, own_ids = [torch.empty_like(tensor) for tensor in weights], [torch.empty_like(tensor) for tensor in ids]
    routed: list[Tensor | None] = [None] * NUM_LAYERS

    def route_own(launched: bool) -> None:
        for layer in range(NUM_LAYERS):
            own_weights[layer].copy_(weights[layer])
            own_ids[layer].copy_(ids[layer])
            if launched:
                routed[layer] = own.route_and_count(own_weights[layer], own_ids[layer], logits[layer], roles, step=step)[1]

    ways = {
        "kernel": (lambda: launch(False), new_ids),
        "kernel, counting": (lambda: launch(True), new_ids),
        "recipe": (run_recipe, recipe_ids),
    }
    expected = [reroute_reference(*layer[:3], primary_top_k=primary_top_k, threshold=THRESHOLD) for layer in layers]
    for name, (run, results) in ways.items():
        for result in new_ids:
            result.fill_(-77)
        run()
        for layer, (result, reference) in enumerate(zip(results, expected, strict=True)):
            if not torch.equal(result.cpu(), reference):
                raise SystemExit(
                    f"the {name} differs from the reference at T={num_tokens} E={num_experts}, layer {layer}: nothing is timed"
                )
    route_own(True)
    torch_own = Policy(oea, LayerInfo(device=torch.device("cpu"), **info))
    for layer, (drawn, found) in enumerate(zip(layers, routed, strict=True)):
        if found is None or not torch.equal(found.cpu(), torch_own.route(*drawn[:2], drawn[3], roles.cpu())[1]):
            raise SystemExit(f"own targets are wrong at T={num_tokens} E={num_experts}, layer {layer}: nothing is timed")
    timed = {name: run for name, (run, _) in ways.items()}
    timed |= {"own and copies": partial(route_own, True), "copies": partial(route_own, False)}
    return {name: time_graph(run, repeats) for name, run in timed.items()}


def bench_gpu(repeats: int) -> dict[str, Any]:
    from sere.ops.kernels import cuda

    device = torch.device("cuda", torch.cuda.current_device())
    cuda.warm_up(device)
    floor = time_graph(empty_kernel(device), repeats)
    print(f"empty kernel: {spread(floor)} us", flush=True)
    rows = []
    for (num_experts, top_k), primary_top_k, num_tokens in itertools.product(SHAPES, (1, 2), NUM_TOKENS):
        row: dict[str, Any] = dict(num_experts=num_experts, top_k=top_k, primary_top_k=primary_top_k, num_tokens=num_tokens)
        row |= bench_shape(num_tokens, num_experts, top_k, primary_top_k, device=device, repeats=repeats)
        rows.append(row)
        print(
            f"E={num_experts} K={top_k} S={primary_top_k} T={num_tokens}: {row['kernel']['median']:.2f} us, counting "
            f"{row['kernel, counting']['median']:.2f}, recipe {row['recipe']['median']:.2f}",
            flush=True,
        )
    return {"empty kernel": floor, "rows": rows}


def gpu_table(results: dict[str, Any]) -> list[str]:
    floor = results["empty kernel"]["median"]
    lines = [
        f"One step of one layer: T tokens, E experts, top-K, primary_top_k S, threshold {THRESHOLD}. "
        f"Microseconds per launch in a CUDA graph of {NUM_LAYERS}: median (p20 to p80). Checked against the reference first.",
        "",
        f"Empty kernel: {spread(results['empty kernel'])}.",
        "",
        "| E, K | S | T | kernel, us (p20 to p80) | with counters | times the empty kernel | recipe, us | recipe / kernel "
        "| own |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        kernel, median = row["kernel"], row["kernel"]["median"]
        cells = [
            f"{row['num_experts']}, {row['top_k']}",
            f"{row['primary_top_k']}",
            f"{row['num_tokens']}",
            spread(kernel),
            f"{row['kernel, counting']['median']:.2f}",
            f"{median / floor:.2f}",
            f"{row['recipe']['median']:.2f}",
            f"{row['recipe']['median'] / median:.1f}",
            f"{row['own and copies']['median'] - row['copies']['median']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def measure(function: Callable[[], object], repeats: int) -> dict[str, float]:
    for _ in range(max(3, repeats // 10)):
        function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append((time.perf_counter() - started) * 1e6)
    return summary(times)


def bench_cpu(args: argparse.Namespace) -> dict[str, Any]:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    generator = torch.Generator().manual_seed(0)
    weights, ids, similarity, _ = draw(args.tokens, args.experts, args.top_k, generator)
    roles = torch.full((args.tokens,), DECODE, dtype=torch.int8)
    settings = dict(primary_top_k=args.primary_top_k, threshold=THRESHOLD, roles=roles)
    new_ids = reroute_topk(weights, ids, similarity, **settings)
    if not torch.equal(new_ids, reroute_reference(weights, ids, similarity, **settings)):
        raise SystemExit("the op differs from the reference on these inputs: no time is reported")
    config = Qwen3MoeConfig(
        hidden_size=args.hidden,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        moe_intermediate_size=args.intermediate,
        experts_implementation="grouped_mm",
    )
    experts = Qwen3MoeExperts(config).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(std=0.02, generator=generator)
    hidden = torch.randn(args.tokens, args.hidden, generator=generator)
    with torch.inference_mode():
        rows = {
            "re-route": measure(lambda: reroute_topk(weights, ids, similarity, **settings), args.repeats),
            "experts of the layer, as routed": measure(lambda: experts(hidden, ids.long(), weights), args.repeats // 10),
            "experts of the layer, re-routed": measure(lambda: experts(hidden, new_ids.long(), weights), args.repeats // 10),
        }
    return {"rows": rows, "active_experts": [ids.unique().numel(), new_ids.unique().numel()]}


def cpu_table(results: dict[str, Any], args: argparse.Namespace) -> list[str]:
    rows, (before, after) = results["rows"], results["active_experts"]
    share = rows["re-route"]["median"] / rows["experts of the layer, as routed"]["median"]
    return [
        f"One step of one layer: {args.tokens} tokens, {args.experts} experts, top-{args.top_k}, S={args.primary_top_k}, "
        f"threshold {THRESHOLD}. Active experts {before} -> {after}. Checked against the reference first.",
        f"The layer: hidden {args.hidden}, intermediate {args.intermediate}, float32, as Transformers computes it. "
        f"{args.repeats} repeats, a tenth for the layer.",
        "",
        "| | microseconds: median (p20 to p80) |",
        "|---|---:|",
        *(f"| {name} | {spread(numbers, 1)} |" for name, numbers in rows.items()),
        "",
        f"Re-routing takes {share:.2%} of the layer's experts.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=positive, default=200)
    parser.add_argument("--out", type=report_path, help="write OUT.json and OUT.md")
    for name, default in (("tokens", 64), ("experts", 128), ("top-k", 8), ("primary-top-k", 2)):
        parser.add_argument(f"--{name}", type=positive, default=default, help="CPU only")
    for name, default in (("hidden", 2048), ("intermediate", 768)):
        parser.add_argument(f"--{name}", type=positive, default=default, help="CPU only: of the layer beside it")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if args.repeats < 20:
        parser.error(f"--repeats: at least 20, got {args.repeats}")
    if args.top_k > args.experts:
        parser.error(f"--top-k: at most --experts, {args.experts}, got {args.top_k}")
    if args.device == "cuda":
        from sere.ops.kernels.compile import install_line

        try:
            import cupy
        except ImportError as error:
            parser.error(f"--device cuda needs CuPy, which cannot be imported ({error}): {install_line()}")
        results = bench_gpu(args.repeats)
        table, versions = gpu_table(results), [f"CuPy {cupy.__version__}"]
    else:
        results = bench_cpu(args)
        table, versions = cpu_table(results, args), []
    report("Time of re-routing", [environment(*versions), "", *table], args.out, environment=environment(*versions), **results)


if __name__ == "__main__":
    main()
