"""Real vLLM engines for tests, and prompts whose answers the demo model knows."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.conftest import DEMO_MODEL

PROMPTS = [f"{task} {question}=" for task, question in [
    ("add", "455+116"), ("sums", "4 5 5 8 9 3"), ("sort", "gzekfwdefg"), ("reverse", "hglehlmu"),
    ("tally", "qniznqqn"), ("next", "ologqbatau"), ("max", "485 874 272"), ("seq", "21 28 35"),
    ("zip", "sdorq lkqnv"), ("add", "992+110"), ("sums", "3 7 1 4 4 6 5"), ("sort", "qwerty"),
    ("reverse", "abcdef"), ("next", "zebra"), ("max", "111 999 555"), ("seq", "5 10 15"),
    ("zip", "abc xyz"), ("add", "1+2"), ("sort", "zyxwvut"), ("reverse", "stressed"),
]]  # fmt: skip


@contextmanager
def engine(sere: dict[str, Any] | None = None, **arguments: Any) -> Iterator[Any]:
    """An `LLM` of the demo model in this process, shut down at the end."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    settings = dict(
        model=str(DEMO_MODEL),
        dtype="float32",
        max_num_seqs=16,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 27,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    if sere is not None:
        settings["additional_config"] = {"sere": sere}
    llm = None
    try:
        llm = LLM(**{**settings, **arguments})
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def greedy(max_tokens: int = 24, **arguments: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **arguments)


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def core(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core


def moe_layers(llm: Any) -> dict[int, Any]:
    """The `MoERunner` of each layer."""
    layers = core(llm).vllm_config.compilation_config.static_forward_context.values()
    return {layer.layer_id: layer for layer in layers if hasattr(layer, "router")}
