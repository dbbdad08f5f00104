"""Active experts and exact match by the order of the rows: what grouping alike rows does to decode batches.

    sere calibrate conf/calibrate.yaml num_sequences=200 judge.held_out_rows=0 tracking.uri= \\
        output=runs/ordering/similarity.safetensors
    OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind \\
        python scripts/benchmarks/bench_ordering.py --similarity runs/ordering/similarity.safetensors [--out ...]

Every ordering (`row_orderings.py`; * marks those that need the answers: upper bounds) under every policy: in static batches,
each decoded to its end before the next one starts, and with continuous batching, where the next row takes a place that becomes
free. Greedy, float32, eager, no prefix caching.

A batch shrinks while its rows finish, and rows of equal answer length keep it full: then a step has more rows, more active
experts, and there are fewer steps. Beside the mean per step, therefore: the mean at equal rows (means by number of rows,
weighted as the random orderings' steps are) and the experts read per token (active experts over all steps, divided by tokens).
With continuous batching most of these short answers' steps also have prompt rows. Means per step leave such steps out; the
experts read per token have them in, and steps of prompts alone, which no counter sees, as if all experts were active.

Nothing is reported unless every layer counted as many decode rows as tokens were decoded, and the unmodified model's
answers depend on the ordering in at most 1 row of 100 (floating-point sums depend on the rows beside a row).
"""

import argparse
import gc
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from benchmark import environment, integers, positive, report, report_path
from decode_engine import DEFAULTS
from numpy.typing import NDArray
from row_orderings import make_orderings, router_vectors

ROOT = Path(__file__).resolve().parents[2]
POLICIES = {
    "unmodified": {"policy": "none"},
    "sere S=2": {"policy": "sere", "primary_top_k": 2},
    "sere S=1": {"policy": "sere", "primary_top_k": 1},
    "random S=2": {"policy": "random", "primary_top_k": 2},
}
BASELINE = "random"


class Engine:
    """One engine in this process, under one policy, that says what every step counted."""

    def __init__(self, llm: Any, stats_dir: str, max_tokens: int) -> None:
        from vllm import SamplingParams

        self.llm, self.stats_dir = llm.llm_engine, stats_dir
        self.sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
        self.num_experts = llm.llm_engine.model_config.get_num_experts()
        self.ids = itertools.count()

    def counters(self) -> NDArray:
        """int64 `[num_layers, len(COUNTERS)]` so far."""
        from sere.ops.engine.counters import read_counters
        from sere.ops.kernels.counting import COUNTERS

        return np.array([[layer.counts[name] for name in COUNTERS] for layer in read_counters(self.stats_dir)])

    def decode(self, prompts: list[str]) -> tuple[list[str], int, NDArray, int]:
        """Decode prompts that arrive together.

        Returns:
            The answers; how many tokens were decoded, without each row's first, which its prompt's step makes; what each step
            with decode rows counted, int64 `[num_steps, num_layers, len(COUNTERS)]`; and how many steps had prompts alone.
        """
        numbers = {str(next(self.ids)): place for place, _ in enumerate(prompts)}
        for name, place in numbers.items():
            self.llm.add_request(name, prompts[place], self.sampling)
        answers, num_tokens, steps, prompt_steps = [""] * len(prompts), 0, [], 0
        before = self.counters()
        while self.llm.has_unfinished_requests():
            for output in self.llm.step():
                if output.finished:
                    answers[numbers[output.request_id]] = output.outputs[0].text.strip()
                    num_tokens += len(output.outputs[0].token_ids) - 1
            after = self.counters()
            if (after != before).any():
                steps.append(after - before)
            else:
                prompt_steps += 1
            before = after
        return answers, num_tokens, np.stack(steps), prompt_steps


@contextmanager
def start_engine(sere: dict[str, Any], args: argparse.Namespace) -> Iterator[Engine]:
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from sere.ops.engine.plugin import register

    # Where the package is installed vLLM has done this; calling it again does nothing.
    register()
    with tempfile.TemporaryDirectory(prefix="bench-ordering-") as stats_dir:
        needed = {"similarity": args.similarity, "threshold": 0.0} if sere["policy"] == "sere" else {"threshold": 0.0}
        llm = LLM(
            model=args.model,
            dtype="float32",
            max_num_seqs=max(args.batches),
            enforce_eager=True,
            enable_prefix_caching=False,
            # A step is over, and counted, before the next one is planned.
            async_scheduling=False,
            kv_cache_memory_bytes=1 << 28,
            disable_log_stats=True,
            additional_config={"sere": {**sere, **needed, "stats_dir": stats_dir}},
        )
        try:
            yield Engine(llm, stats_dir, args.max_tokens)
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()


def run(engine: Engine, rows: list[dict[str, str]], order: list[int], *, batch: int, continuous: bool) -> dict[str, Any]:
    """All rows in one order.

    Raises:
        SystemExit: if the counters do not hold the tokens decoded.
    """
    from sere.ops.kernels.counting import COUNTERS

    column = {name: number for number, name in enumerate(COUNTERS)}
    size = len(order) if continuous else batch
    answers: dict[int, str] = {}
    num_tokens, steps, prompt_steps = 0, [], 0
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        texts, decoded, counted, prompts_alone = engine.decode([rows[row]["prompt"] for row in chosen])
        answers |= dict(zip(chosen, texts, strict=True))
        num_tokens += decoded
        steps.append(counted)
        prompt_steps += prompts_alone
    every = np.concatenate(steps)
    if (every.sum(0)[:, column["decode_rows"]] != num_tokens).any() or (every[:, :, column["steps"]] != 1).any():
        raise SystemExit(f"{num_tokens} tokens were decoded, the counters say otherwise: nothing is reported")
    alone = every[every[:, 0, column["mixed_steps"]] == 0]
    num_rows = alone[:, 0, column["decode_rows"]]
    before, after = (alone[:, :, column[f"active_experts_{when}"]].mean(1) for when in ("before", "after"))
    if (num_rows == 0).any() or num_rows.max() > batch:
        raise SystemExit(f"a decode step has {num_rows.max()} rows at batch {batch}: nothing is reported")
    curve = {
        int(size): [int(chosen.sum()), float(before[chosen].mean()), float(after[chosen].mean())]
        for size in np.unique(num_rows)
        for chosen in [num_rows == size]
    }
    total = every.sum((0, 1))

    def read(when: str) -> float:
        active = every[:, :, column[f"active_experts_{when}"]].mean(1).sum()
        return float((active + prompt_steps * engine.num_experts) / num_tokens)

    return {
        "hits": "".join(str(int(answers[number] == row["reference"].strip())) for number, row in enumerate(rows)),
        "answers": [answers[number] for number in range(len(rows))],
        "tokens": num_tokens,
        "steps": len(every),
        "mixed_steps": len(every) - len(alone),
        "prompt_steps": prompt_steps,
        "rows_per_step": float(num_rows.mean()),
        "before": float(before.mean()),
        "after": float(after.mean()),
        "read_per_token_before": read("before"),
        "read_per_token_after": read("after"),
        "rerouted_share": float(total[column["rerouted_slots"]] / total[column["decode_slots"]]),
        # steps, mean before, mean after, by number of decode rows
        "curve": curve,
    }


def at_equal_rows(runs: list[dict[str, Any]], baseline: list[dict[str, Any]], place: int) -> float:
    """Mean active experts as if the steps' numbers of rows were those of the baseline. `place`: 1 before, 2 after re-routing.

    A number of rows that these runs never had takes its value from the neighbouring ones.
    """

    def pooled(runs: list[dict[str, Any]]) -> dict[int, NDArray]:
        sums: dict[int, NDArray] = {}
        for run in runs:
            for size, (steps, before, after) in run["curve"].items():
                sums[size] = sums.get(size, 0) + np.array([steps, steps * before, steps * after])
        return sums

    own, reference = pooled(runs), pooled(baseline)
    sizes = sorted(own)
    means = [own[size][place] / own[size][0] for size in sizes]
    weights = [steps[0] for steps in reference.values()]
    return float(np.average(np.interp(list(reference), sizes, means), weights=weights))


def hit_rates(runs: list[dict[str, Any]]) -> NDArray:
    """Share of the runs in which each row's answer is right."""
    return np.array([[int(hit) for hit in run["hits"]] for run in runs]).mean(0)


def interval(differences: NDArray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over rows."""
    draws = np.random.default_rng(seed).integers(len(differences), size=(4000, len(differences)))
    low, high = np.quantile(differences[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


def summarize(results: list[dict[str, Any]], tasks: list[str]) -> list[dict[str, Any]]:
    """A row per setting and ordering, beside the random orderings of the same setting."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["mode"], result["batch"], result["policy"], result["ordering"]), []).append(result)
    table = []
    for (mode, batch, policy, ordering), runs in groups.items():
        baseline = groups[mode, batch, policy, BASELINE]
        rates, reference = hit_rates(runs), hit_rates(baseline)
        row = {"mode": mode, "batch": batch, "policy": policy, "ordering": ordering, "num_runs": len(runs)}
        names = [name for name, value in runs[0].items() if isinstance(value, int | float) and name not in ("batch", "seed")]
        row |= {name: float(np.mean([run[name] for run in runs])) for name in names}
        row["before_at_equal_rows"] = at_equal_rows(runs, baseline, 1)
        row["after_at_equal_rows"] = at_equal_rows(runs, baseline, 2)
        row["exact_match"] = float(rates.mean())
        row["exact_match_per_task"] = {task: float(rates[np.array(tasks) == task].mean()) for task in sorted(set(tasks))}
        row["difference"] = float((rates - reference).mean())
        row["difference_interval"] = interval(rates - reference)
        if len(runs) > 1:
            by_run = {"exact_match": [hit_rates([run]).mean() for run in runs]}
            by_run |= {name: [run[name] for run in runs] for name in ("before", "after", "read_per_token_after")}
            row["spread"] = {name: [float(min(values)), float(max(values))] for name, values in by_run.items()}
        table.append(row)
    return table


def table_lines(table: list[dict[str, Any]]) -> list[str]:
    """A table per mode and batch."""
    lines = []
    for mode, batch in dict.fromkeys((row["mode"], row["batch"]) for row in table):
        lines += [
            f"## {mode}, decode batch {batch}",
            "",
            "| policy | ordering | steps: decode / mixed / prompt | rows per decode step | active before | after "
            "| at equal rows: before | after | read per token: before | after | re-routed "
            "| exact match | difference to random (95 %) |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for row in table:
            if (row["mode"], row["batch"]) != (mode, batch):
                continue
            ranges = {name: f" ({low:.{2 + (name == 'exact_match')}f}-{high:.{2 + (name == 'exact_match')}f})"
                      for name, (low, high) in row.get("spread", {}).items()}  # fmt: skip
            low, high = row["difference_interval"]
            difference = "" if row["ordering"] == BASELINE else f"{row['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
            lines.append(
                f"| {row['policy']} | {row['ordering']} "
                f"| {row['steps'] - row['mixed_steps']:.0f} / {row['mixed_steps']:.0f} / {row['prompt_steps']:.0f} "
                f"| {row['rows_per_step']:.2f} "
                f"| {row['before']:.2f}{ranges.get('before', '')} | {row['after']:.2f}{ranges.get('after', '')} "
                f"| {row['before_at_equal_rows']:.2f} | {row['after_at_equal_rows']:.2f} "
                f"| {row['read_per_token_before']:.2f} | {row['read_per_token_after']:.2f} "
                f"| {row['rerouted_share']:.1%} | {row['exact_match']:.3f}{ranges.get('exact_match', '')} | {difference} |"
            )
        lines.append("")
    return lines


def task_lines(table: list[dict[str, Any]], mode: str, batch: int) -> list[str]:
    """Exact match by task: a row per re-routing policy and ordering of one setting."""
    chosen = [row for row in table if (row["mode"], row["batch"]) == (mode, batch) and row["rerouted_share"]]
    tasks = list(chosen[0]["exact_match_per_task"])
    return [
        f"## Exact match by task, {mode}, decode batch {batch}",
        "",
        f"| policy | ordering | {' | '.join(tasks)} |",
        f"|---|---|{'---:|' * len(tasks)}",
        *(
            f"| {row['policy']} | {row['ordering']} | "
            + " | ".join(f"{value:.2f}" for value in row["exact_match_per_task"].values())
            + " |"
            for row in chosen
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--similarity", required=True, help="artifact of sere calibrate")
    parser.add_argument("--model", default=str(ROOT / "assets/demo-moe"))
    parser.add_argument("--data", default=str(ROOT / "assets/evaluation.parquet"), help="with prompt, reference and task")
    parser.add_argument("--rows", type=positive, help="only the first rows")
    parser.add_argument("--batches", type=integers, default=[16, 4], help="the first also with continuous batching")
    parser.add_argument("--seeds", type=positive, default=5, help="random orderings")
    parser.add_argument("--max-tokens", type=positive, default=48, help="tokens per row")
    parser.add_argument("--out", type=report_path, help="write OUT.json and OUT.md")
    args = parser.parse_args()
    if not Path(args.similarity).is_file():
        parser.error(f"--similarity: no file {args.similarity}: make one with sere calibrate")
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)

    import pyarrow.parquet as pq
    import vllm

    rows = pq.read_table(args.data).to_pylist()[: args.rows]
    vectors = router_vectors(args.model, [row["prompt"] for row in rows], [row["reference"] for row in rows])
    orderings = make_orderings(rows, vectors, args.seeds)
    modes = [("continuous", args.batches[0]), *(("static", batch) for batch in args.batches)]
    results, changed, unmodified = [], {}, None
    for policy, sere in POLICIES.items():
        with start_engine(sere, args) as engine:
            engine.decode([row["prompt"] for row in rows[: max(args.batches)]])
            for (mode, batch), (ordering, seeds) in itertools.product(modes, orderings.items()):
                for seed, make in enumerate(seeds):
                    result = run(engine, rows, make(batch), batch=batch, continuous=mode == "continuous")
                    answers = result.pop("answers")
                    if sere["policy"] == "none":
                        unmodified = unmodified or answers
                        num_changed = sum(a != b for a, b in zip(answers, unmodified, strict=True))
                        changed[f"{mode} {batch}, {ordering}, {seed}"] = num_changed
                        if num_changed > len(rows) / 100:
                            raise SystemExit(
                                f"unmodified answers of {num_changed} rows depend on the ordering: nothing is reported"
                            )
                    results.append(
                        {"policy": policy, "mode": mode, "batch": batch, "ordering": ordering, "seed": seed, **result}
                    )
        print(f"{time.strftime('%X')} {policy}: {len(results)} runs so far", flush=True)

    machine = environment(f"vLLM {vllm.__version__}")
    table = summarize(results, [row["task"] for row in rows])
    lines = [
        machine,
        "",
        f"{len(rows)} rows. Unmodified answers that differ from those of the first run: {max(changed.values())} at most, over "
        f"{len(changed)} runs. Random: mean and range of {args.seeds} seeds; task: of {len(orderings['task'])}.",
        "",
        *table_lines(table),
        *task_lines(table, "static", args.batches[0]),
    ]
    report("Order of the rows", lines, args.out, environment=machine, arguments=vars(args) | {"out": str(args.out)},
           policies=POLICIES, changed_answers=changed, table=table, runs=results)  # fmt: skip


if __name__ == "__main__":
    main()
