"""Error of the CKA estimate by tokens per block and tokens in total.

    python scripts/benchmarks/bench_cka.py [--out docs/benchmarks/cka-estimator]

Calibration sums the unbiased HSIC of blocks of tokens before it takes the ratio. Here its matrices, and those
of the biased HSIC summed alike, are compared with full-batch unbiased CKA over all tokens there are. Data: outputs of all
experts of the demo model on its calibration text, with tokens in the order of the text (a block comes from few texts), shuffled
in batches (what a job can do that reads several texts in one forward pass) and shuffled all together; and synthetic outputs of
a larger hidden size.

Errors are over off-diagonal entries, and over all disjoint stretches of a given total. Nearest: the share of experts whose
most similar other expert is that of the full batch. Nothing is reported unless the estimator, given all tokens as one block,
agrees with the full batch, which is computed in another way.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark import environment, positive, report, report_path, spread, summary
from torch import Tensor

from sere.calibration_jobs.metrics.cka import CkaMetric

BLOCKS = [4, 8, 16, 32, 64, 128, 256, 512]
STRETCH = max(BLOCKS)
SLACK = 1.1
NAMES = {"RMS error": "rms", "mean error": "mean", "Spearman": "spearman", "nearest": "nearest"}
SYNTHETIC = (16, 32768, 512)


def demo_outputs(model: str, data: str, layers: list[int], sequence_length: int = 128) -> dict[int, Tensor]:
    """Outputs of all experts of some layers for every token of the data: float32 `[num_experts, num_tokens, hidden_size]`."""
    import pyarrow.parquet
    import transformers

    from sere.calibration_jobs.capture.batches import pad_rows
    from sere.calibration_jobs.capture.experts import ExpertsCall, intercept_experts

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    settings = dict(dtype=torch.float32, experts_implementation="grouped_mm")
    network = transformers.AutoModelForCausalLM.from_pretrained(model, **settings).eval()
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    valid = torch.empty(0)

    def handle(call: ExpertsCall) -> Tensor:
        if call.layer in parts:
            parts[call.layer].append(call.all_experts(call.hidden_states[valid]))
        return call.run()

    texts = pyarrow.parquet.read_table(data)["text"].to_pylist()
    rows = [ids[:sequence_length] for ids in tokenizer(texts)["input_ids"]]
    with torch.inference_mode(), intercept_experts(network, handle):
        for start in range(0, len(rows), 8):
            batch = pad_rows(rows[start : start + 8])
            valid = batch["attention_mask"].bool().flatten()
            network(**batch, use_cache=False)
    return {layer: torch.cat(blocks, dim=1) for layer, blocks in parts.items()}


def synthetic_outputs(num_experts: int, num_tokens: int, hidden_size: int) -> Tensor:
    """Noisy linear maps of latent variables, of which experts share less and less. Shape and dtype as above."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, 65) ** -0.5
    common = torch.randn(num_tokens, 64, generator=generator) * scale
    outputs = torch.randn(num_experts, num_tokens, hidden_size, generator=generator)
    for expert, share in enumerate(torch.linspace(1, 0, num_experts)):
        latent = share * common + (1 - share) * torch.randn(num_tokens, 64, generator=generator) * scale
        outputs[expert] += latent @ torch.randn(64, hidden_size, generator=generator)
    return outputs


def full_batch(outputs: Tensor, tokens_per_product: int = 4096) -> Tensor:
    """Unbiased CKA of all tokens as one batch, by way of features: float64 `[num_experts, num_experts]`, clamped to [0, 1].

    With centred outputs the sum of products of two Gram matrices off their diagonals is |X'Y|^2 - sum |x|^2 |y|^2, and a row
    of a Gram matrix without its diagonal sums to -|x|^2. So nothing grows with the square of the tokens.
    """
    num_experts, n, hidden_size = outputs.shape
    mean = outputs.mean(1, keepdim=True, dtype=torch.float64)
    traces = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    norms = torch.cat([(part - mean).square().sum(-1) for part in outputs.split(tokens_per_product, 1)], 1)
    parts = [(part - mean).float().transpose(0, 1).flatten(1) for part in outputs.split(tokens_per_product, 1)]
    for i in range(num_experts):
        columns = slice(i * hidden_size, (i + 1) * hidden_size)
        cross = torch.zeros(hidden_size, (num_experts - i) * hidden_size, dtype=torch.float64)
        for part in parts:
            cross += part[:, columns].T @ part[:, columns.start :]
        traces[i, i:] = cross.view(hidden_size, num_experts - i, hidden_size).square().sum((0, 2))
    traces = torch.triu(traces) + torch.triu(traces, 1).T
    totals, products = norms.sum(1), norms @ norms.T
    return ratio(traces - products + totals[:, None] * totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * products)


def ratio(hsic: Tensor) -> Tensor:
    """CKA from HSIC of all pairs."""
    scale = hsic.diagonal().clamp(min=1e-300).sqrt()
    return (hsic / scale / scale[:, None]).clamp(0, 1).fill_diagonal_(1)


def biased_hsic(outputs: Tensor) -> Tensor:
    """HSIC of Gretton et al. 2005 of one block, all pairs: float64 `[num_experts, num_experts]`."""
    centred = outputs - outputs.mean(1, keepdim=True)
    gram = (centred @ centred.transpose(1, 2)).double().flatten(1)
    return gram @ gram.T / (outputs.shape[1] - 1) ** 2


def check(outputs: Tensor) -> float:
    """Largest difference between the estimator and the full batch by features, all tokens as one block."""
    metric = CkaMetric(outputs.shape[0])
    metric.update(outputs)
    difference = (metric.finalize() - full_batch(outputs)).abs().max().item()
    if not difference <= 1e-5:
        raise SystemExit(f"CKA of {outputs.shape[1]} tokens as one block is off by {difference}: nothing is reported")
    return difference


def upper(matrix: Tensor) -> Tensor:
    return matrix[tuple(torch.triu_indices(*matrix.shape, offset=1))].double()


def compare(estimates: list[Tensor], truth: Tensor) -> dict[str, float]:
    """Root-mean-square error and mean error, Spearman correlation, and agreement of the nearest expert."""
    errors = torch.stack([upper(estimate) - upper(truth) for estimate in estimates])
    ranks = [upper(matrix).argsort().argsort().double() for matrix in (truth, *estimates)]
    nearest = [(matrix - 2 * torch.eye(len(matrix))).argmax(1) for matrix in (truth, *estimates)]
    return {
        "rms": errors.square().mean().sqrt().item(),
        "mean": errors.mean().item(),
        "spearman": sum(torch.corrcoef(torch.stack([ranks[0], rank]))[0, 1].item() for rank in ranks[1:]) / len(estimates),
        "nearest": sum((nearest[0] == other).double().mean().item() for other in nearest[1:]) / len(estimates),
    }


def bench_block(outputs: Tensor, truth: Tensor, block: int, totals: list[int]) -> dict[str, Any]:
    """Both estimators with one block size, for every total, and the seconds of ours for each stretch but the first."""
    stretches: list[tuple[CkaMetric, Tensor]] = []
    seconds = []
    for stretch in outputs[:, : totals[-1]].split(STRETCH, dim=1):
        metric = CkaMetric(outputs.shape[0])
        started = time.perf_counter()
        for part in stretch.split(block, dim=1):
            metric.update(part)
        seconds.append(time.perf_counter() - started)
        stretches.append((metric, sum(biased_hsic(part) for part in stretch.split(block, dim=1))))
    scratch = peak_bytes(lambda: CkaMetric(outputs.shape[0]).update(outputs[:, :block]))
    result: dict[str, Any] = {"block": block, "seconds": seconds[1:], "scratch": scratch, "totals": []}
    for total in totals:
        unbiased, biased = [], []
        for start in range(0, len(stretches), total // STRETCH):
            group = stretches[start : start + total // STRETCH]
            metric = CkaMetric(outputs.shape[0])
            for other, _ in group:
                metric.merge(other)
            unbiased.append(metric.finalize())
            biased.append(ratio(sum(hsic for _, hsic in group)))
        result["totals"].append({"total": total, "unbiased": compare(unbiased, truth), "biased": compare(biased, truth)})
    return result


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes that torch had allocated at once on the CPU during a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def recommend(when: str, cases: list[dict[str, Any]]) -> list[str]:
    """The block size to use, by a rule, from the largest total of each case; and its error there."""
    excess = dict.fromkeys(BLOCKS, 1.0)
    cost = dict.fromkeys(BLOCKS, 0.0)
    for case in cases:
        errors = {row["block"]: row["totals"][-1]["unbiased"]["rms"] for row in case["rows"]}
        for row in case["rows"]:
            excess[row["block"]] = max(excess[row["block"]], errors[row["block"]] / min(errors.values()))
            cost[row["block"]] += summary(row["seconds"])["median"]
    fits = [block for block in BLOCKS if excess[block] <= SLACK]
    choice = min(fits, key=cost.__getitem__) if fits else min(BLOCKS, key=excess.__getitem__)
    why = f"the quickest whose error is within {SLACK - 1:.0%} of the least in every case: {', '.join(map(str, fits))}"
    return [
        f"**{when}: {choice} tokens per block**, {why if fits else 'the nearest to the least error in its worst case'}.",
        "\n| block | error / least error, worst case | time / least time |\n|---:|---:|---:|",
        *(f"| {block} | {excess[block]:.2f} | {cost[block] / min(cost.values()):.2f} |" for block in BLOCKS),
        f"\nRMS error with {choice} tokens per block:\n",
        *(f"- {case['name']}: {case['rows'][BLOCKS.index(choice)]['totals'][-1]['unbiased']['rms']:.4f}" for case in cases),
        "",
    ]


def case_table(case: dict[str, Any]) -> list[str]:
    totals = [entry["total"] for entry in case["rows"][0]["totals"]]
    lines = [
        f"## {case['name']}",
        "",
        f"{case['experts']} experts, hidden size {case['hidden']}; CKA of the full batch, {case['tokens']} tokens, is "
        f"{case['least']:.3f} to {case['most']:.3f}.",
        "",
        f"Of {totals[-1]} tokens; beside each figure the biased one. Time of ours per {STRETCH} tokens (p20 to p80), "
        "its scratch memory at the peak, and the outputs it is given:",
        "",
        f"| block |{''.join(f' {name} | biased |' for name in NAMES)} ms | scratch, MiB | outputs, MiB |\n{'|---:' * 12}|",
    ]
    for row in case["rows"]:
        ours, biased = row["totals"][-1]["unbiased"], row["totals"][-1]["biased"]
        cells = [f"{side[name]:.4f}" for name in NAMES.values() for side in (ours, biased)]
        sizes = row["scratch"], case["experts"] * case["hidden"] * row["block"] * 4
        cells += [spread(summary([1e3 * s for s in row["seconds"]]), 1), *(f"{size / 2**20:.1f}" for size in sizes)]
        lines.append(f"| {row['block']} | {' | '.join(cells)} |")
    lines += ["", "RMS error of the unbiased estimate by total:", ""]
    lines += [f"| block | {' | '.join(map(str, totals))} |", "|---:" * (len(totals) + 1) + "|"]
    for row in case["rows"]:
        errors = " | ".join(f"{entry['unbiased']['rms']:.4f}" for entry in row["totals"])
        lines.append(f"| {row['block']} | {errors} |")
    return [*lines, ""]


def draw(cases: list[dict[str, Any]], path: Path) -> None:
    """Error by block size, a panel per case."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(cases), figsize=(2.6 * len(cases), 2.8), sharey=True, squeeze=False, layout="tight")
    for panel, case in zip(panels[0], cases, strict=True):
        totals = [entry["total"] for entry in case["rows"][0]["totals"]]
        lines = [("unbiased", index, "o-") for index in (0, len(totals) // 2, -1)]
        for side, index, style in (*lines, ("biased", -1, "x--")):
            errors = [row["totals"][index][side]["rms"] for row in case["rows"]]
            panel.plot(BLOCKS, errors, style, markersize=3, linewidth=1, label=f"{side}, {totals[index]} tokens")
        panel.set(xscale="log", yscale="log", xlabel="tokens per block")
        panel.set_title(case["name"], fontsize=8)
        panel.set_xticks(BLOCKS[::2], list(map(str, BLOCKS[::2])))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("RMS error")
    panels[0][0].legend(fontsize=6, loc="lower left")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/demo-moe")
    parser.add_argument("--data", default="assets/calibration.parquet")
    parser.add_argument("--layers", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    parser.add_argument("--tokens", type=positive, default=16384, help="largest total: a power of two")
    parser.add_argument("--batch", type=positive, default=1024, help="tokens shuffled together: those of a forward pass")
    parser.add_argument("--out", type=report_path, help="write OUT.json, OUT.md and OUT.png")
    args = parser.parse_args()
    if not 8 * STRETCH <= args.tokens <= SYNTHETIC[1] or args.tokens & (args.tokens - 1):
        parser.error(f"--tokens: a power of two, {8 * STRETCH} to {SYNTHETIC[1]}, got {args.tokens}")
    totals = [STRETCH << i for i in range((args.tokens // STRETCH).bit_length())]
    cases = []

    def add(name: str, outputs: Tensor, truth: Tensor) -> None:
        num_experts, num_tokens, hidden_size = outputs.shape
        case: dict[str, Any] = dict(name=name, experts=num_experts, tokens=num_tokens, hidden=hidden_size)
        case |= dict(least=upper(truth).min().item(), most=upper(truth).max().item(), difference=check(outputs[:, :1024]))
        case["rows"] = [bench_block(outputs, truth, block, totals) for block in BLOCKS]
        cases.append(case)
        print(f"{name}: done", flush=True)

    captured = demo_outputs(args.model, args.data, args.layers)
    for layer in args.layers:
        outputs = captured.pop(layer)
        if outputs.shape[1] < args.tokens:
            parser.error(f"{args.data} has {outputs.shape[1]} tokens, --tokens is {args.tokens}")
        truth = full_batch(outputs)
        generator, whole = torch.Generator().manual_seed(0), torch.arange(outputs.shape[1])
        for name, size in (("in order", 1), ("shuffled in batches", args.batch), ("shuffled", len(whole))):
            order = torch.cat([part[torch.randperm(len(part), generator=generator)] for part in whole.split(size)])
            add(f"layer {layer}, {name}", outputs[:, order], truth)
    outputs = synthetic_outputs(*SYNTHETIC)
    add("synthetic", outputs, full_batch(outputs))

    settings = {name: str(value) if name == "out" else value for name, value in vars(args).items()}
    lines = [environment(), "", f"Arguments: {settings}", "", *__doc__.split("\n\n", 2)[2].strip().split("\n")]
    lines += ["", f"Largest difference in that check: {max(case['difference'] for case in cases):.1e}.", ""]
    if args.out is not None:
        draw(cases, args.out.with_suffix(".png"))
        lines += [f"![Error by block size]({args.out.with_suffix('.png').name})", ""]
    for case in cases:
        lines += case_table(case)
    lines += ["## Recommendation", ""]
    for when, other in (("Tokens in the order of the text", "shuffled"), ("Tokens shuffled, if only in batches", "in order")):
        lines += recommend(when, [case for case in cases if other not in case["name"]])
    report("Error of the CKA estimate", lines, args.out, environment=environment(), arguments=settings, cases=cases)


if __name__ == "__main__":
    main()
