"""Every named policy over its dial at equal active experts: what each costs in exact matches, KL and agreement.

    python scripts/benchmarks/bench_policies.py --artifact runs/demo-moe/similarity.safetensors --out docs/benchmarks/policies

Teacher-forced with exact prompts on tasks that neither training nor calibration saw, decoded in batches, static and refilled.
A row is an exact match of greedy decoding where all its tokens are the model's first choice. Losses are against the
unmodified model on the same rows, with 95% intervals of the paired differences.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmark import environment, integers, report, report_path

from sere.calibration_jobs.judge.candidates import Emulated
from sere.calibration_jobs.judge.emulation import ROW_FIGURES, Answered, AnswerEmulation, Outcome
from sere.conf.schema import RerouteConfig
from sere.ops.similarity import SimilarityArtifact

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo_model"))
ROOT = Path(__file__).resolve().parents[2]
CHUNK_ROWS = 512
TEXT_PROMPT, TEXT_ANSWER = 48, 48
TOP = ("top_k", "random", "sere", "oea", "sere_t rank 0", "sere_t rank 1", "sere_t rank 2")
BUDGETS = ("xshare", "des_vote", "lynx", "exfold")
OTHERS: dict[str, list[dict[str, Any]]] = {
    "naee_skip": [{}, {"share": 0.5}, {"share": 0.25}],
    "oea by mass": [{"rule": "mass", "mass": value} for value in (0.25, 0.4, 0.55, 0.7)],
    "oea by share": [{"rule": "share", "share": value} for value in (0.9, 0.7, 0.5, 0.35)],
    "oea by benefit": [{"rule": "benefit", "benefit": value} for value in (0.2, 0.15, 0.12, 0.09)],
}
# One rule exchanged at a time, at the same votes.
ABLATION: dict[str, dict[str, Any]] = {
    "similar, keep (sere)": {"targets": {"rule": "similar", "threshold": 0.0}, "weights": "keep"},
    "least loss, keep": {"targets": {"rule": "least_loss"}, "weights": "keep"},
    "least loss, fold": {"targets": {"rule": "least_loss"}, "weights": "fold"},
    "drop, keep": {"targets": {"rule": "drop"}, "weights": "keep"},
    "drop, half": {"targets": {"rule": "drop"}, "weights": "half"},
    "drop, renormalize": {"targets": {"rule": "drop"}, "weights": "renormalize"},
    "own, keep": {"targets": {"rule": "own"}, "weights": "keep"},
    "own, half": {"targets": {"rule": "own"}, "weights": "half"},
    "own, renormalize (oea)": {"targets": {"rule": "own"}, "weights": "renormalize"},
    "own, renormalize, votes by selection": {"votes": {"order": "selection"}},
    **{
        f"{targets}, {weights}, {label}": {
            "targets": {"rule": targets, **({"threshold": 0.0} if targets == "similar" else {})},
            "weights": weights,
            "compensation": compensation,
        }
        for label, compensation in (
            ("mean", {"rule": "mean"}),
            ("rank 1", {"rule": "surrogate", "rank": 1}),
            ("rank 2", {"rule": "surrogate", "rank": 2}),
        )
        for targets, weights in (
            ("similar", "keep"),
            ("drop", "keep"),
            ("drop", "half"),
            ("own", "keep"),
            ("own", "half"),
            ("own", "renormalize"),
        )
    },
}


@dataclass(frozen=True)
class Variant:
    """One policy at one dial."""

    family: str
    dial: str
    reroute: RerouteConfig


@dataclass
class Result:
    """What a variant did to all rows."""

    variant: Variant
    rows: list[torch.Tensor] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    charge: float = 0.0

    def add(self, outcome: Outcome) -> None:
        self.rows.append(outcome.rows)
        self.charge = outcome.charge
        for name, value in outcome.counts.items():
            self.counts[name] = self.counts.get(name, 0) + value

    def figures(self, unmodified: "Result") -> dict[str, Any]:
        """Paired figures against the unmodified model's."""
        ours, theirs = torch.cat(self.rows), torch.cat(unmodified.rows)
        tokens, correct = ROW_FIGURES.index("tokens"), ROW_FIGURES.index("correct")
        match, base = (rows[:, correct] == rows[:, tokens] for rows in (ours, theirs))
        lost = base.double() - match.double()
        kl = ours[:, ROW_FIGURES.index("kl")].sum() / ours[:, tokens].sum()
        agreement = ours[:, ROW_FIGURES.index("agreement")].sum() / ours[:, tokens].sum()
        width = 1.96 * lost.std().item() / math.sqrt(len(lost))
        active = self.counts["pure_active_experts_after"] / max(1, self.counts["pure_steps"])
        return {
            "policy": self.variant.family,
            "dial": self.variant.dial,
            "active": active,
            "active_all_steps": self.counts["active_experts_after"] / self.counts["steps"],
            "active_before": self.counts["pure_active_experts_before"] / max(1, self.counts["pure_steps"]),
            "charged": active + self.charge,
            "loss": 100 * lost.mean().item(),
            "loss_low": 100 * (lost.mean().item() - width),
            "loss_high": 100 * (lost.mean().item() + width),
            "exact_match": match.double().mean().item(),
            "kl": 1e4 * kl.item(),
            "disagreement": 100 * (1 - agreement.item()),
            "num_rows": len(lost),
        }


def settings(name: str, **more: Any) -> RerouteConfig:
    family, _, rank = name.partition(" rank ")
    compensation = {"compensation": {"rank": int(rank)}} if rank else {}
    return RerouteConfig(policy=family.split()[0], similarity="in memory", threshold=0.0, **compensation, **more)  # type: ignore[arg-type]


def top_variants(top_ks: list[float]) -> Iterator[Variant]:
    for name, top_k in itertools.product(TOP, top_ks):
        yield Variant(name, f"S={top_k:g}", settings(name, primary_top_k=top_k))


def budget_variants(budgets: list[int]) -> Iterator[Variant]:
    for name, budget in itertools.product(BUDGETS, budgets):
        yield Variant(name, f"m={budget}", settings(name, votes={"budget": budget}))


def other_variants() -> Iterator[Variant]:
    for name, dials in OTHERS.items():
        for votes in dials:
            shown = ", ".join(f"{key}={value}" for key, value in votes.items() if key != "rule") or "median"
            yield Variant(name, shown, settings(name, votes=votes))


def ablation_variants(top_k: float) -> Iterator[Variant]:
    for name, rules in ABLATION.items():
        reroute = RerouteConfig(policy="oea", similarity="in memory", primary_top_k=top_k, **rules)
        yield Variant(name, f"S={top_k:g}", reroute)


def fresh_tasks(number: int, tasks: list[str] | None = None) -> list[tuple[str, str, str]]:
    """Task, prompt and answer of rows that no training saw: of all tasks but `look`, which the bundled model does not know."""
    from tasks import TASKS, examples

    return list(itertools.islice(examples("evaluation", 1, tasks or [task for task in TASKS if task != "look"]), number))


def task_rows(tokenizer: Any, number: int, tasks: list[str] | None) -> list[Answered]:
    return [_answered(tokenizer, prompt, answer) for _, prompt, answer in fresh_tasks(number, tasks)]


def _answered(tokenizer: Any, prompt: str, answer: str) -> Answered:
    return Answered(tuple(tokenizer.encode(prompt)), (*tokenizer.encode(answer), tokenizer.eos_token_id))


def text_rows(tokenizer: Any, number: int) -> list[Answered]:
    """Passages of library text of the evaluation split: a read beginning, and a decoded end."""
    from tasks import library_text

    tokens = tokenizer.encode(library_text("evaluation").decode("utf-8", errors="ignore"))
    size = TEXT_PROMPT + TEXT_ANSWER
    starts = torch.randint(0, len(tokens) - size, (number,), generator=torch.Generator().manual_seed(0)).tolist()
    return [Answered(tuple(tokens[s : s + TEXT_PROMPT]), tuple(tokens[s + TEXT_PROMPT : s + size])) for s in starts]


def measure(chunks: list[AnswerEmulation], variants: list[Variant], tables: Any, batch_size: int, refill: bool) -> list[Result]:
    results = []
    for variant in variants:
        result = Result(variant)
        emulated = Emulated(variant.family, variant.reroute, tables)
        for chunk in chunks:
            result.add(chunk.run(emulated, batch_size=batch_size, refill=refill))
        results.append(result)
    return results


def load(model: Path, artifact: Path) -> tuple[Any, Any, dict[int, Any]]:
    """Model, tokenizer, and what the artifact knows by layer."""
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    loaded.set_experts_implementation("grouped_mm")
    found = SimilarityArtifact.load(artifact)
    tables = {layer: found.layer_tables(layer) for layer in found.layers}
    return loaded, transformers.AutoTokenizer.from_pretrained(model), tables


def chunks_of(model: Any, rows: list[Answered]) -> list[AnswerEmulation]:
    """Rows as so many forward passes; whole batches in each."""
    return [AnswerEmulation(model, rows[start : start + CHUNK_ROWS]) for start in range(0, len(rows), CHUNK_ROWS)]


UNMODIFIED = Variant("none", "", RerouteConfig(policy="none"))


def figures_of_tasks(
    model: Path, artifact: Path, rows: list[tuple[str, str, str]], variants: list[Variant], *, batch_size: int
) -> list[dict[str, Any]]:
    """Figures of the unmodified model and of each variant, emulated on given rows in static batches."""
    loaded, tokenizer, tables = load(model, artifact)
    chunks = chunks_of(loaded, [_answered(tokenizer, prompt, answer) for _, prompt, answer in rows])
    unmodified, *results = measure(chunks, [UNMODIFIED, *variants], tables, batch_size, False)
    return [result.figures(unmodified) for result in (unmodified, *results)]


def table_of(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| policy | dial | active experts | charged | loss in points (95%) | KL x 10^4 | other next token % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        loss = f"{row['loss']:.2f} [{row['loss_low']:.2f}, {row['loss_high']:.2f}]"
        lines.append(
            f"| {row['policy']} | {row['dial']} | {row['active']:.1f} | {row['charged']:.1f} | {loss} | {row['kl']:.1f} | "
            f"{row['disagreement']:.2f} |"
        )
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "assets/demo-moe")
    parser.add_argument("--artifact", type=Path, required=True, help="calibrated on the model")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--data", choices=("tasks", "text"), default="tasks")
    parser.add_argument("--tasks", type=lambda text: text.split(","), help="those that the model knows; all but look")
    parser.add_argument("--batch-sizes", type=integers, default=[16])
    parser.add_argument("--refill", action="store_true", help="places are refilled, as in an engine that never waits")
    parser.add_argument("--top-k", type=lambda text: [float(part) for part in text.split(",")], default=[1, 2, 3, 4])
    parser.add_argument("--only", default="", help="policies whose name contains this")
    parser.add_argument("--ablation", action="store_true", help="targets x weights x compensation at --top-k instead")
    parser.add_argument("--out", type=report_path, help="write OUT.md and OUT.json")
    return parser.parse_args()


def main() -> None:
    import transformers

    arguments = parse()
    model, tokenizer, tables = load(arguments.model, arguments.artifact)
    if arguments.data == "tasks":
        rows = task_rows(tokenizer, arguments.rows, arguments.tasks)
    else:
        rows = text_rows(tokenizer, arguments.rows)
    chunks = chunks_of(model, rows)
    lines, found = [environment(f"transformers {transformers.__version__}"), ""], []
    for batch_size in arguments.batch_sizes:
        started = time.monotonic()
        (unmodified,) = measure(chunks, [UNMODIFIED], tables, batch_size, arguments.refill)
        if arguments.ablation:
            variants = [variant for top_k in arguments.top_k for variant in ablation_variants(top_k)]
        else:
            reference = measure(
                chunks, [v for v in top_variants(arguments.top_k) if v.family == "oea"], tables, batch_size, arguments.refill
            )
            budgets = [round(r.counts["pure_active_experts_after"] / max(1, r.counts["pure_steps"])) for r in reference]
            variants = [*top_variants(arguments.top_k), *budget_variants(budgets), *other_variants()]
        variants = [variant for variant in variants if arguments.only in variant.family]
        results = measure(chunks, variants, tables, batch_size, arguments.refill)
        figures = [result.figures(unmodified) for result in results]
        base = unmodified.figures(unmodified)
        lines += [
            f"## Decode batch {batch_size}, {'refilled places' if arguments.refill else 'static batches'}",
            "",
            f"{base['num_rows']} rows ({arguments.data}), unmodified: exact match {base['exact_match']:.4f}, "
            f"{base['active']:.1f} active experts. {time.monotonic() - started:.0f} s.",
            "",
            *table_of(figures),
            "",
        ]
        print("\n".join(lines[-len(figures) - 5 :]), flush=True)
        found.append({"batch_size": batch_size, "refill": arguments.refill, "unmodified": base, "policies": figures})
    report("Routing policies at equal active experts", lines, arguments.out, runs=found)


if __name__ == "__main__":
    main()
