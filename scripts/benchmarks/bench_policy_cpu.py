"""Time of one step of one layer on the CPU, for every named policy: compiled code beside torch's operations.

    python scripts/benchmarks/bench_policy_cpu.py [--out docs/benchmarks/policies-cpu]

Both sides are timed in turn, in one thread, on the same inputs and with counters; what is printed is medians. Nothing is timed
whose result differs from the reference on these inputs.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark import environment, positive, report, report_path, summary
from torch import Tensor

from sere.conf.schema import RerouteConfig
from sere.conf.schema.named import NAMED
from sere.ops.kernels import cpu_library
from sere.ops.kernels.counting import COUNTERS
from sere.ops.policies.policy import LayerInfo, Policy
from sere.ops.policies.scoring import Scoring
from sere.ops.reference import DECODE, route_reference

SHAPES = [(64, 8), (128, 8), (256, 8)]
NUM_TOKENS = [1, 16, 64, 256]
SCORING = Scoring(function="softmax")
GOALS = {("sere", 64, 128): 10, ("oea", 64, 128): 6}


def tables_of(num_experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    matrix = torch.rand(num_experts, num_experts, generator=generator)
    return {
        "cosine": ((matrix + matrix.T) / 2).fill_diagonal_(1),
        "norms": torch.rand(num_experts, generator=generator) + 0.5,
        "beta": torch.tensor([0.4]),
        "folds": torch.randn(num_experts, num_experts, generator=generator),
        "fold_losses": torch.rand(num_experts, num_experts, generator=generator).fill_diagonal_(0),
        "means": torch.zeros(num_experts, 1),
    }


class Case:
    """One policy at one size: both sides, on the same step."""

    def __init__(self, name: str, num_tokens: int, num_experts: int, top_k: int) -> None:
        generator = torch.Generator().manual_seed(num_tokens)
        tables = tables_of(num_experts, generator)
        self.logits = torch.randn(num_tokens, num_experts, generator=generator)
        weights, ids = self.logits.softmax(-1).topk(top_k)
        self.weights, self.ids = weights / weights.sum(1, keepdim=True), ids.int()
        votes = {"budget": num_experts // 3} if NAMED[name].votes["rule"] == "budget" else {}
        config = RerouteConfig(policy=name, similarity="drawn", votes=votes)
        layer = LayerInfo(
            index=0,
            num_experts=num_experts,
            top_k=top_k,
            renormalize=True,
            device=torch.device("cpu"),
            scoring=SCORING,
        )
        self.compiled, self.torch = Policy(config, layer, tables), Policy(config, layer, tables)
        self.torch.fast = None
        if self.compiled.fast is None:
            raise SystemExit("there is no compiled code on this machine: nothing is timed")
        self.roles = torch.full((num_tokens,), DECODE, dtype=torch.int8)
        self.step = torch.tensor([num_tokens, num_tokens, 1])
        self.counters = torch.zeros(len(COUNTERS), dtype=torch.int64)
        compensates = config.rules(0).compensation.rule != "none"
        self.difference = torch.zeros(num_tokens, num_experts) if compensates else None
        scores, _ = SCORING.scores(self.logits)
        expected = route_reference(config, self.weights, self.ids, scores, tables=tables)
        for policy in (self.compiled, self.torch):
            new_weights, new_ids = self.run(policy)
            if not torch.equal(new_ids, expected[1]) or not torch.allclose(new_weights, expected[0], rtol=1e-6, atol=0):
                raise SystemExit(f"{name} differs from the reference at T={num_tokens} E={num_experts}: nothing is timed")
        self.active = self.ids.unique().numel(), expected[1].unique().numel()

    def run(self, policy: Policy) -> tuple[Tensor, Tensor]:
        return policy.route_and_count(
            self.weights,
            self.ids,
            self.logits,
            self.roles,
            step=self.step,
            counters=self.counters,
            difference=self.difference,
        )

    def measure(self, repeats: int) -> dict[str, Any]:
        """Microseconds of each side, taken in turn."""
        times: dict[str, list[float]] = {"compiled": [], "torch": []}
        with torch.inference_mode():
            for repeat in range(repeats + repeats // 10):
                for side, policy in (("compiled", self.compiled), ("torch", self.torch)):
                    elapsed = seconds(lambda policy=policy: self.run(policy))
                    if repeat >= repeats // 10:
                        times[side].append(elapsed * 1e6)
        return {side: summary(values) for side, values in times.items()}


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def library_times() -> dict[str, float]:
    """Seconds to compile the library, once per machine, and to load it, once per process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.so"
        return {
            "compile_s": seconds(lambda: cpu_library.compile_library(path)),
            "load_s": seconds(lambda: cpu_library.load(path)),
            "bytes": path.stat().st_size,
        }


def table(rows: list[dict[str, Any]], library: dict[str, float]) -> list[str]:
    size, compile_s, load_ms = library["bytes"] / 1024, library["compile_s"], library["load_s"] * 1e3
    lines = [
        "One step of one layer with its counters: votes, targets, weights; for sere_t what experts have lost, too. T decode "
        "rows, E experts, top-K, S=2, budgets of E/3 experts, threshold 0.5, softmax scores. Microseconds of the compiled "
        "code: median (torch's operations / compiled). One thread; both sides in turn. Checked against the reference first.",
        "",
        f"The library of {size:.0f} KiB is compiled once per machine in {compile_s:.1f} s and loaded in {load_ms:.1f} ms.",
    ]
    for num_experts, top_k in SHAPES:
        lines += ["", f"## E={num_experts}, K={top_k}", "", f"| policy | {' | '.join(f'T={n}' for n in NUM_TOKENS)} |"]
        lines.append(f"|---|{'---:|' * len(NUM_TOKENS)}")
        for name in NAMED:
            cells = [
                f"{row['compiled']['median']:.1f} ({row['torch']['median'] / row['compiled']['median']:.0f}x)"
                for row in rows
                if (row["policy"], row["num_experts"]) == (name, num_experts)
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| goal | asked | measured |", "|---|---:|---:|"]
    for row in rows:
        if goal := GOALS.get((row["policy"], row["num_tokens"], row["num_experts"])):
            ratio = row["torch"]["median"] / row["compiled"]["median"]
            size = f"T={row['num_tokens']}, E={row['num_experts']}"
            lines.append(f"| {row['policy']} beside torch's operations, {size} | {goal}x | {ratio:.1f}x |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive, default=200)
    parser.add_argument("--out", type=report_path, help="write OUT.json and OUT.md")
    args = parser.parse_args()
    if args.repeats < 20:
        parser.error(f"--repeats: at least 20, got {args.repeats}")
    torch.set_num_threads(1)
    rows = []
    for (num_experts, top_k), name, num_tokens in itertools.product(SHAPES, NAMED, NUM_TOKENS):
        case = Case(name, num_tokens, num_experts, top_k)
        row: dict[str, Any] = dict(policy=name, num_tokens=num_tokens, num_experts=num_experts, top_k=top_k)
        rows.append(row | {"active_experts": case.active} | case.measure(args.repeats))
    library = library_times()
    report(
        "Time of a policy's step on the CPU",
        [environment(), "", *table(rows, library)],
        args.out,
        environment=environment(),
        library=library,
        rows=rows,
    )


if __name__ == "__main__":
    main()
