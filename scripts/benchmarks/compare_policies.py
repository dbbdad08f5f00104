"""What bench_policies.py's figures say of policies against each other: at equal cost, and row by row against `oea`.

    python scripts/benchmarks/compare_policies.py equal RESULTS.json --at 16,21
    python scripts/benchmarks/compare_policies.py paired --artifact ARTIFACT --rows 4096 --top-k 2,3

`equal` takes the KL of each policy at the same number of charged active experts, in logarithms between two of its dials, from
what `bench_policies.py --out RESULTS` wrote. `paired` runs the policies on the same rows in the same batches, and gives the
difference of their KL x 10^4 per decoded token with a 95% interval over rows.
"""

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path

import torch
from bench_policies import ROOT, chunks_of, load, settings, task_rows

from sere.calibration_jobs.judge.candidates import Emulated

AGAINST, OTHERS = "oea", ("sere", "sere_t rank 0", "sere_t rank 2")
# Columns of an emulation's rows.
_KL, _TOKENS = 1, 3


def floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def kl_at(rows: list[dict[str, float]], charged: float) -> float | None:
    """KL at a number of charged active experts; None where a policy's dials do not reach it."""
    for low, high in pairwise(sorted(rows, key=lambda row: row["charged"])):
        if low["charged"] <= charged <= high["charged"]:
            share = (charged - low["charged"]) / (high["charged"] - low["charged"])
            return math.exp((1 - share) * math.log(low["kl"]) + share * math.log(high["kl"]))
    return None


def equal(arguments: argparse.Namespace) -> None:
    rows = json.loads(arguments.results.read_text())["runs"][0]["policies"]
    print(f"| KL x 10^4 at charged active experts | {' | '.join(f'{at:g}' for at in arguments.at)} |")
    print("|---|" + "---|" * len(arguments.at))
    for name in dict.fromkeys(row["policy"] for row in rows):
        found = [kl_at([row for row in rows if row["policy"] == name], at) for at in arguments.at]
        print(f"| {name} | {' | '.join('-' if kl is None else f'{kl:.1f}' for kl in found)} |")


def paired(arguments: argparse.Namespace) -> None:
    model, tokenizer, tables = load(arguments.model, arguments.artifact)
    chunks = chunks_of(model, task_rows(tokenizer, arguments.rows, arguments.tasks))
    print(f"| KL x 10^4 less that of {AGAINST}, by row (95%) | {' | '.join(f'S={top_k:g}' for top_k in arguments.top_k)} |")
    print("|---|" + "---|" * len(arguments.top_k))
    cells: dict[str, list[str]] = {name: [] for name in OTHERS}
    for top_k in arguments.top_k:

        def rows_of(name: str, top_k: float = top_k) -> torch.Tensor:
            emulated = Emulated(name, settings(name, primary_top_k=top_k), tables)
            return torch.cat([chunk.run(emulated, batch_size=arguments.batch_size).rows for chunk in chunks])

        reference = rows_of(AGAINST)
        num_tokens = reference[:, _TOKENS].sum()
        for name in OTHERS:
            gaps = rows_of(name)[:, _KL] - reference[:, _KL]
            mean = (gaps.sum() / num_tokens * 1e4).item()
            margin = (1.96 * gaps.std() * math.sqrt(len(gaps)) / num_tokens * 1e4).item()
            cells[name].append(f"{mean:.1f} [{mean - margin:.1f}, {mean + margin:.1f}]")
    for name, found in cells.items():
        print(f"| {name} | {' | '.join(found)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = parser.add_subparsers(required=True)
    word = words.add_parser("equal", help="at equal charged active experts, from results")
    word.add_argument("results", type=Path, help="OUT.json of bench_policies.py")
    word.add_argument("--at", type=floats, required=True, help="charged active experts")
    word.set_defaults(run=equal)
    word = words.add_parser("paired", help="row by row against oea")
    word.add_argument("--model", type=Path, default=ROOT / "assets/demo-moe")
    word.add_argument("--artifact", type=Path, required=True, help="calibrated on the model")
    word.add_argument("--rows", type=int, default=4096)
    word.add_argument("--tasks", type=lambda text: text.split(","), help="those that the model knows; all but look")
    word.add_argument("--batch-size", type=int, default=16)
    word.add_argument("--top-k", type=floats, default=[2, 3])
    word.set_defaults(run=paired)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
