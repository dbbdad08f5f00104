"""Time of re-routing one layer's step on the CPU, beside the layer it belongs to.

    python scripts/bench_reroute.py [--tokens 64] [--experts 128] [--top-k 8] [--json FILE]

Refuses to print a time unless the op equals the reference on the very inputs it times. The layer is a float32 MoE layer of
the given sizes, as Transformers computes it on the CPU (grouped matrix products over the selected experts).
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from ops.reference import DECODE, reroute_reference
from ops.reroute import reroute_topk
from ops.stats import COUNTERS, count_step


def measure(function: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median, 20th and 80th percentile in microseconds, after a warm-up."""
    for _ in range(max(3, repeats // 10)):
        function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append((time.perf_counter() - started) * 1e6)
    p20, median, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {"median_us": round(median, 1), "p20_us": round(p20, 1), "p80_us": round(p80, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--primary-top-k", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(args.tokens, args.experts, generator=generator)
    weights, ids = logits.softmax(-1).topk(args.top_k)
    weights, ids = weights / weights.sum(-1, keepdim=True), ids.int()
    similarity = torch.rand(args.experts, args.experts, generator=generator)
    similarity = torch.maximum(similarity, similarity.T).fill_diagonal_(1)
    roles = torch.full((args.tokens,), DECODE, dtype=torch.int8)
    settings = dict(primary_top_k=args.primary_top_k, threshold=0.5, roles=roles)

    new_ids = reroute_topk(weights, ids, similarity, **settings)
    if not torch.equal(new_ids, reroute_reference(weights, ids, similarity, **settings)):
        raise SystemExit("the op differs from the reference on these inputs: no time is printed")

    counters, num_decode = torch.zeros(len(COUNTERS), dtype=torch.int64), torch.tensor(args.tokens)

    def count() -> None:
        count_step(
            counters,
            topk_weights=weights,
            ids_before=ids,
            ids_after=new_ids,
            roles=roles,
            num_decode_rows=num_decode,
            num_experts=args.experts,
            primary_top_k=args.primary_top_k,
        )

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

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    with torch.inference_mode():
        results = {
            "re-route": measure(lambda: reroute_topk(weights, ids, similarity, **settings), args.repeats),
            "count": measure(count, args.repeats),
            "experts of the layer, as routed": measure(lambda: experts(hidden, ids.long(), weights), args.repeats // 10),
            "experts of the layer, re-routed": measure(lambda: experts(hidden, new_ids.long(), weights), args.repeats // 10),
        }
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit}"
    print(f"T={args.tokens} E={args.experts} K={args.top_k} S={args.primary_top_k}; {machine}")
    print(f"active experts {ids.unique().numel()} -> {new_ids.unique().numel()}")
    print(f"{'':34} {'median':>10} {'p20':>10} {'p80':>10}  us")
    for name, numbers in results.items():
        print(f"{name:34} {numbers['median_us']:10.1f} {numbers['p20_us']:10.1f} {numbers['p80_us']:10.1f}")
    share = results["re-route"]["median_us"] / results["experts of the layer, as routed"]["median_us"]
    print(f"re-routing takes {share:.2%} of the layer's experts")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"arguments": vars(args), "machine": machine, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
