"""Real vLLM engines for tests, started as rarely as can be, and prompts whose answers the demo model knows."""

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tests.conftest import DEMO_MODEL

PROMPTS = [f"{task} {question}=" for task, question in [
    ("add", "455+116"), ("sums", "4 5 5 8 9 3"), ("sort", "gzekfwdefg"), ("reverse", "hglehlmu"),
    ("tally", "qniznqqn"), ("next", "ologqbatau"), ("max", "485 874 272"), ("seq", "21 28 35"),
    ("zip", "sdorq lkqnv"), ("add", "992+110"), ("sums", "3 7 1 4 4 6 5"), ("sort", "qwerty"),
    ("reverse", "abcdef"), ("next", "zebra"), ("max", "111 999 555"), ("seq", "5 10 15"),
    ("zip", "abc xyz"), ("add", "1+2"), ("sort", "zyxwvut"), ("reverse", "stressed"),
]]  # fmt: skip


_kept: tuple[dict[str, Any], ExitStack, Any] | None = None
"""The arguments of the engine that lives, what ends it, and the engine: vLLM has one at a time in a process."""


@contextmanager
def engine(sere: dict[str, Any] | None = None, *, fresh: bool = False, **arguments: Any) -> Iterator[Any]:
    """An `LLM` of the demo model in this process. Starts take seconds, so it is kept, and given the settings of the next test
    that asks for one of the same arguments, in the way the plugin does it at the start.

    Args:
        sere: The plugin's section of `additional_config`; None: no such section.
        fresh: Start one for this use alone.
        arguments: Of `LLM`, beside those that all tests share.
    """
    global _kept
    kind = {**arguments, "has_section": sere is not None}
    if fresh or _kept is None or _kept[0] != kind:
        end_engine()
        stack = ExitStack()
        _kept = kind, stack, stack.enter_context(_started(sere, arguments))
    elif sere is not None:
        apply_settings(_kept[2], sere)
    try:
        yield _kept[2]
    except BaseException:
        fresh = True
        raise
    finally:
        if fresh:
            end_engine()


def end_engine() -> None:
    """End the engine that is kept, if there is one."""
    global _kept
    if _kept is not None:
        stack, _kept = _kept[1], None
        stack.close()


@contextmanager
def _started(sere: dict[str, Any] | None, arguments: dict[str, Any]) -> Iterator[Any]:
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


def apply_settings(llm: Any, sere: dict[str, Any]) -> None:
    """Make the policies of a running engine anew.

    Raises:
        ConfigError: as the engine's start would.
    """
    from sere.ops.engine.plugin import attach
    from sere.ops.engine.state import ENGINE_STATES, EngineState

    vllm_config = core(llm).vllm_config
    state = EngineState(sere, vllm_config)
    for runner in moe_layers(llm).values():
        attach(runner, state.add_layer(runner))
    state.finish_start(vllm_config)
    ENGINE_STATES[id(vllm_config.compilation_config.static_forward_context)] = state


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
