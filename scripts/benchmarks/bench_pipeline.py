"""The whole pipeline against bare `vllm.LLM.generate`: same prompts, engine settings and machine, one after the other.

    python scripts/benchmarks/bench_pipeline.py --out docs/benchmarks/pipeline-cpu

The pipeline's time begins when its replica is ready, as the bare engine's does, and ends when the last row is on disk: reading,
Ray, dispatch, prompts, tokens to text, evaluation of progress and writing are in it. Engine start is reported apart.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from benchmark import environment, positive, report, report_path, spread, summary

ROOT = Path(__file__).resolve().parents[2]
_BARE = "--bare"


def engine_arguments(model: str, *, max_num_seqs: int, eager: bool) -> dict:
    return {
        "model": model,
        "dtype": "float32",
        "max_num_seqs": max_num_seqs,
        "enforce_eager": eager,
        "distributed_executor_backend": "uni",
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 2**28,
    }


def run_bare(job: Path) -> None:
    """In a process of its own: one engine, all prompts in one call. Prints seconds and tokens as JSON."""
    settings = json.loads(job.read_text())
    prompts = pq.read_table(settings["data"])["prompt"].to_pylist()
    # Importing vLLM is part of a replica's start, too.
    started = time.perf_counter()
    from vllm import LLM, SamplingParams

    llm = LLM(**settings["engine"])
    # As a replica does at its start.
    llm.generate({"prompt_token_ids": [0] * 8}, SamplingParams(max_tokens=1), use_tqdm=False)
    ready = time.perf_counter()
    sampling = SamplingParams(temperature=0.0, max_tokens=settings["max_tokens"])
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - ready
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    texts = [output.outputs[0].text for output in outputs]
    Path(settings["answer"]).write_text(
        json.dumps({"startup_s": ready - started, "seconds": seconds, "tokens": tokens, "texts": texts})
    )


def bare(job: Path, settings: dict) -> dict:
    job.write_text(json.dumps(settings))
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    subprocess.run([sys.executable, __file__, _BARE, str(job)], env=environment, check=True, capture_output=True)
    return json.loads(Path(settings["answer"]).read_text())


def pipeline(folder: Path, settings: dict, *, batch_size: int, concurrent_batches: int) -> dict:
    engine = settings["engine"]
    overrides = [
        f"model={engine['model']}",
        f"data={settings['data']}",
        f"output={folder}",
        "tracking.uri=",
        "reroute=null",
        f"batch_size={batch_size}",
        f"concurrent_batches={concurrent_batches}",
        f"sampling.max_tokens={settings['max_tokens']}",
        f"engine.max_num_seqs={engine['max_num_seqs']}",
        f"engine.enforce_eager={str(engine['enforce_eager']).lower()}",
        "engine.engine_kwargs={enable_prefix_caching: false}",
    ]
    command = [sys.executable, "-m", "sere.pipeline.cli", "generate", "conf/generate.yaml", *overrides]
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    whole = time.perf_counter() - started
    figures = json.loads((folder / "summary.json").read_text())
    table = pq.read_table(folder / "results").sort_by("source_row")
    return {
        "startup_s": figures["startup_s"],
        "seconds": figures["working_s"],
        "generation_s": figures["generation_s"],
        "whole_s": whole,
        "tokens": figures["generated_tokens"],
        "texts": table["generated_text"].to_pylist(),
    }


def main() -> None:
    if sys.argv[1:2] == [_BARE]:
        run_bare(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "assets" / "demo-moe"))
    parser.add_argument("--num-prompts", type=positive, default=2000)
    parser.add_argument("--max-tokens", type=positive, default=48)
    parser.add_argument("--max-num-seqs", type=positive, default=32)
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--concurrent-batches", type=positive, default=8)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--compiled", action="store_true", help="with torch.compile; eager otherwise")
    parser.add_argument("--out", type=report_path, help="writes OUT.md and OUT.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        rows = pq.read_table(ROOT / "assets" / "evaluation.parquet").select(["prompt"])
        times = 1 + arguments.num_prompts // len(rows)
        pq.write_table(pa.concat_tables([rows] * times).slice(0, arguments.num_prompts), place / "prompts.parquet")
        settings = {
            "data": str(place / "prompts.parquet"),
            "answer": str(place / "answer.json"),
            "max_tokens": arguments.max_tokens,
            "engine": engine_arguments(arguments.model, max_num_seqs=arguments.max_num_seqs, eager=not arguments.compiled),
        }
        pairs = []
        for number in range(arguments.repeats):
            run = {"batch_size": arguments.batch_size, "concurrent_batches": arguments.concurrent_batches}
            steps = [
                lambda: ("bare", bare(place / "job.json", settings)),
                lambda number=number, run=run: ("pipeline", pipeline(place / f"run-{number}", settings, **run)),
            ]
            # Each comes first as often as the other: a machine's other work drifts.
            pair = dict(step() for step in (steps if number % 2 == 0 else reversed(steps)))
            texts = pair["bare"].pop("texts"), pair["pipeline"].pop("texts")
            pair["different"] = sum(one != other for one, other in zip(*texts, strict=True))
            pairs.append(pair)
            print(json.dumps(pair), flush=True)
    speed = {side: [pair[side]["tokens"] / pair[side]["seconds"] for pair in pairs] for side in ("bare", "pipeline")}
    ratios = [pipe / plain for pipe, plain in zip(speed["pipeline"], speed["bare"], strict=True)]
    lines = [
        environment(),
        "",
        f"{arguments.num_prompts} prompts, {arguments.max_num_seqs} sequences at a time, {pairs[0]['bare']['tokens']} tokens, "
        f"{arguments.repeats} pairs; median (20th to 80th percentile).",
        "",
        "| | tokens/s | engine start, s |",
        "|---|---|---|",
    ]
    for side, shown in (("bare", "`LLM.generate`"), ("pipeline", "`sere generate`")):
        start = summary([pair[side]["startup_s"] for pair in pairs])
        lines.append(f"| {shown} | {spread(summary(speed[side]), 0)} | {spread(start, 1)} |")
    whole = summary([pair["pipeline"]["whole_s"] for pair in pairs])
    different = [pair["different"] for pair in pairs]
    lines += [
        "",
        f"**Ratio {spread(summary(ratios))}.** The whole command, with Python, Ray and the engine's start and end: "
        f"{spread(whole, 1)} s. Texts that differ from the bare engine's, by rounding in other batches: {different}.",
    ]
    measured = {name: settings[name] for name in ("engine", "max_tokens")}
    report("What the pipeline costs", lines, arguments.out, pairs=pairs, settings=measured, ratios=ratios)


if __name__ == "__main__":
    main()
