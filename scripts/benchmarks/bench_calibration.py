"""Time of the three similarity metrics, beside a double loop over pairs of experts on the same tensors.

    python scripts/benchmarks/bench_calibration.py [--out docs/benchmarks/calibration-cpu]

Both sides compute Frobenius, cosine and CKA from the unbiased HSIC, all tokens at once ("all") and in blocks of tokens whose
HSICs are summed before the ratio. The double loop takes a pair of experts at a time, in three ways that differ in CKA alone:

- per pair: both Gram matrices and all three HSICs are computed again for every pair, as the paper's recipe reads
- self once: an expert's own HSIC is computed once; the Gram matrices still per pair
- kept: Gram matrices and own HSICs are computed once and kept in memory, num_experts * tokens * block * 4 bytes of them

Its loops run in float32, HSIC sums apart. Of the double loop a random sample is timed, pairs and experts apart, and scaled by
their numbers. Every round times our code and then a new sample, so that ratios are of the same minute. The sample's values must
agree with our matrices, or no time is reported.
"""

import argparse
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmark import environment, integers, positive, report, report_path, spread, summary
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sere.calibration_jobs.metrics import METRIC_CLASSES

TOLERANCE = 1e-4
LOOPS = ("per pair", "self once", "kept")
TOTAL = "together"
Kernels = list[tuple[Tensor, Tensor]]
Once = tuple[Kernels | None, float | None]


def draw(num_experts: int, num_tokens: int, hidden_size: int) -> Tensor:
    """Outputs that share a part, more or less of it: similarities are spread out. float32."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(num_tokens, hidden_size, generator=generator)
    own = torch.randn(num_experts, num_tokens, hidden_size, generator=generator)
    return own + common * torch.linspace(0, 2, num_experts)[:, None, None]


def kernels(outputs: Tensor, block: int) -> Kernels:
    """Gram matrix of every block of one expert's outputs, zero on the diagonal, and its row sums."""
    result = []
    for part in outputs.split(block):
        gram = (part @ part.T).fill_diagonal_(0)
        result.append((gram, gram.sum(0).double()))
    return result


def hsic(left: Kernels, right: Kernels) -> float:
    """Unbiased HSIC of Song et al. 2012, summed over blocks."""
    total = 0.0
    for (k, k_rows), (q, q_rows) in zip(left, right, strict=True):
        n = k.shape[0]
        # A float32 dot product of all elements at once is off by 1e-4 at 4096 tokens.
        parts = zip(k.flatten().split(1 << 18), q.flatten().split(1 << 18), strict=True)
        trace = sum(torch.dot(*part).double() for part in parts)
        sums = k_rows.sum() * q_rows.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * torch.dot(k_rows, q_rows)
        total += ((trace + sums) / (n * (n - 3))).item()
    return total


def cka_expert(y: Tensor, block: int, loop: str) -> Once:
    """What a loop computes once for an expert: its kernels and its own HSIC."""
    if loop == "per pair":
        return None, None
    own = kernels(y, block)
    return (own if loop == "kept" else None), hsic(own, own)


def cka_pair(left: Tensor, right: Tensor, block: int, left_once: Once, right_once: Once) -> float:
    """CKA of a pair, computing what was not computed once for its experts."""
    (k, k_own), (q, q_own) = left_once, right_once
    k = kernels(left, block) if k is None else k
    q = kernels(right, block) if q is None else q
    k_own = hsic(k, k) if k_own is None else k_own
    q_own = hsic(q, q) if q_own is None else q_own
    return hsic(k, q) / math.sqrt(k_own * q_own)


def frobenius_pair(left: Tensor, right: Tensor) -> float:
    return torch.linalg.vector_norm(left - right).item()


def cosine_pair(left: Tensor, right: Tensor) -> float:
    return (cosine_similarity(left, right, dim=-1).mean().item() + 1) / 2


def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - started, result


def ours(name: str, outputs: Tensor, block: int) -> Tensor:
    metric = METRIC_CLASSES[name](outputs.shape[0])
    for part in outputs.split(block, dim=1):
        metric.update(part)
    return metric.finalize()


def double_loop(outputs: Tensor, chosen: list[tuple[int, int]], block: int) -> Iterator[tuple[str, str, float, list[float]]]:
    """Metric, loop, seconds for all pairs, and the values of the chosen pairs (of Frobenius, distances)."""
    num_experts = outputs.shape[0]
    scale = num_experts * (num_experts - 1) / 2 / len(chosen)
    for name, function in (("frobenius", frobenius_pair), ("cosine", cosine_pair)):
        taken, values = timed(lambda f: [f(outputs[i], outputs[j]) for i, j in chosen], function)
        yield from ((name, loop, taken * scale, values) for loop in LOOPS)
    experts = {expert for pair in chosen for expert in pair}
    for loop in LOOPS:
        first, once = timed(lambda loop: {i: cka_expert(outputs[i], block, loop) for i in experts}, loop)
        taken, values = timed(lambda once: [cka_pair(outputs[i], outputs[j], block, once[i], once[j]) for i, j in chosen], once)
        yield "cka", loop, first / len(experts) * num_experts + taken * scale, values


def bench(outputs: Tensor, block: int, *, repeats: int, sample: int, rng: random.Random) -> dict[str, Any]:
    """Seconds for all pairs: {"ours" or a loop: {metric or TOTAL: one per round}}, and the largest difference of a value."""
    pairs = list(itertools.combinations(range(outputs.shape[0]), 2))
    farthest = max(frobenius_pair(outputs[i], outputs[j]) for i, j in pairs)
    rounds, difference = [], 0.0
    for _ in range(repeats + 1):
        chosen = rng.sample(pairs, min(sample, len(pairs)))
        times: dict[str, dict[str, float]] = {side: {} for side in ("ours", *LOOPS)}
        matrices = {}
        for name in METRIC_CLASSES:
            times["ours"][name], matrices[name] = timed(ours, name, outputs, block)
        for name, loop, taken, values in double_loop(outputs, chosen, block):
            times[loop][name] = taken
            for pair, value in zip(chosen, values, strict=True):
                similarity = 1 - value / farthest if name == "frobenius" else min(1.0, max(0.0, value))
                difference = max(difference, abs(similarity - matrices[name][pair].item()))
                if not difference <= TOLERANCE:
                    raise SystemExit(f"{name} of {pair}, block {block}, {loop}: off by {difference}: no time is reported")
        for numbers in times.values():
            numbers[TOTAL] = sum(numbers.values())
        rounds.append(times)
    # The first round warms up.
    seconds = {side: {name: [r[side][name] for r in rounds[1:]] for name in rounds[0][side]} for side in rounds[0]}
    return {"seconds": seconds, "difference": difference}


def ratios(row: dict[str, Any], loop: str, name: str = TOTAL) -> dict[str, float]:
    """Time of a loop over ours, round by round."""
    return summary([a / b for a, b in zip(row["seconds"][loop][name], row["seconds"]["ours"][name], strict=True)])


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    lines = [
        f"Hidden size {args.hidden}, float32. Seconds: median (p20 to p80) of {args.repeats} rounds, after one that warms up; "
        f"the double loops are scaled up from {args.sample} pairs a round. Largest difference of a sampled value from ours: "
        f"{max(row['difference'] for row in rows):.1e} ({TOLERANCE:.0e} would stop the run).",
        "",
        "## By metric",
        "",
        "| experts | tokens | block | metric | ours, s | per pair, s | per pair / ours | self once / ours | kept / ours |",
        "|---:|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in (row for row in rows if (row["experts"], row["tokens"]) == (args.experts[0], args.tokens[0])):
        lines += [cells(row, name, f" {name} |") for name in (*METRIC_CLASSES, TOTAL)]
    lines += [
        "",
        "## All three together, as experts and tokens grow",
        "",
        "| experts | tokens | block | ours, s | per pair, s | per pair / ours | self once / ours | kept / ours |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(cells(row, TOTAL, "") for row in rows),
    ]
    return lines


def cells(row: dict[str, Any], name: str, label: str) -> str:
    seconds = [summary(row["seconds"][side][name]) for side in ("ours", "per pair")]
    times = [spread(seconds[0], 3), spread(seconds[1], 1), *(spread(ratios(row, loop, name), 1) for loop in LOOPS)]
    block = "all" if row["block"] == row["tokens"] else row["block"]
    return f"| {row['experts']} | {row['tokens']} | {block} |{label} {' | '.join(times)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=integers, default=[64, 16, 32, 128], help="the first is kept as tokens grow")
    parser.add_argument("--tokens", type=integers, default=[2048, 512, 1024, 4096], help="the first is kept as experts grow")
    parser.add_argument("--hidden", type=positive, default=512)
    parser.add_argument("--block", type=positive, default=256, help="tokens of a minibatch")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--sample", type=positive, default=8, help="pairs timed in a round")
    parser.add_argument("--out", type=report_path, help="write OUT.json and OUT.md")
    args = parser.parse_args()
    if args.repeats < 5:
        parser.error(f"--repeats: at least 5, got {args.repeats}")
    if min(args.experts) < 2 or any(0 < tokens % args.block < 4 for tokens in args.tokens) or min(args.tokens) < 4:
        parser.error("at least 2 experts, 4 tokens, and 4 tokens in the last block")
    sizes = {*itertools.product(args.experts, args.tokens[:1]), *itertools.product(args.experts[:1], args.tokens)}
    rng, rows = random.Random(0), []
    for num_experts, num_tokens in sorted(sizes):
        outputs = draw(num_experts, num_tokens, args.hidden)
        for block in sorted({min(args.block, num_tokens), num_tokens}):
            row = dict(experts=num_experts, tokens=num_tokens, block=block)
            row |= bench(outputs, block, repeats=args.repeats, sample=args.sample, rng=rng)
            rows.append(row)
            print(f"{num_experts} experts, {num_tokens} tokens, block {block}: {spread(ratios(row, 'per pair'))}", flush=True)
    settings = {name: str(value) if name == "out" else value for name, value in vars(args).items()}
    lines = [environment(), "", f"Arguments: {settings}", "", *__doc__.split("\n\n", 2)[2].strip().split("\n"), ""]
    report(
        "Time of the similarity metrics",
        [*lines, *table(rows, args)],
        args.out,
        environment=environment(),
        arguments=settings,
        rows=rows,
    )


if __name__ == "__main__":
    main()
