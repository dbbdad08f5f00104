"""One vLLM engine as a replica uses it: started with the plugin, warm, and asked one row at a time. Knows no parts."""

import gc
import logging
import os
from pathlib import Path
from typing import Any

from sere.conf.errors import ConfigError
from sere.conf.schema import GenerateConfig
from sere.pipeline.generate.replica.answers import Answer
from sere.pipeline.generate.replica.engine_loop import EngineLoop
from sere.pipeline.generate.replica.requests import Request

_OUT_OF_MEMORY = ("out of memory", "OutOfMemoryError", "No available memory for the cache", "Free memory on device")


class ReplicaEngine:
    """A vLLM engine in a thread of its own; its methods are called on one event loop."""

    def __init__(self, config: GenerateConfig, arguments: dict[str, Any], *, scratch: Path) -> None:
        """Start the engine, which takes a minute, in the thread that calls.

        Args:
            config: Of the job.
            arguments: Of vLLM's `EngineArgs`.
            scratch: Folder for sockets, whose end is that of the replica.

        Raises:
            ConfigError: if re-routing is asked for and the engine runs without it.
            Exception: whatever vLLM raises if it does not start.
        """
        # Before vLLM is imported. Its engine is a process of its own, as tests may have turned off.
        multiprocessing = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_RPC_BASE_PATH": str(scratch)}
        os.environ.update(multiprocessing | {"VLLM_LOGGING_LEVEL": "INFO"})
        # On CPUs vLLM would bind every replica to the same cores; Ray has given each a number of threads.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        logging.getLogger("vllm").setLevel(logging.INFO)
        from vllm import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.metrics.loggers import PrometheusStatLogger

        self._config = config
        self._last_parameters: tuple[dict[str, Any], Any] | None = None
        self.scheduler: Any = None
        """vLLM's latest `SchedulerStats`; None before the first step."""
        self.prefix_cache_queries = self.prefix_cache_hits = 0
        """Tokens of prompts that were looked for in the prefix cache, and those that were there."""
        engine = self

        class Scheduler(PrometheusStatLogger):
            """Keeps the scheduler's latest figures; vLLM's Prometheus logger, which it replaces, slows small models."""

            def __init__(self, *args: Any, **kwargs: Any) -> None: ...

            def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
                if scheduler_stats is not None:
                    engine.scheduler = scheduler_stats
                    # Of the prompts that this step began with; those that were pushed out and come back are not among them.
                    engine.prefix_cache_queries += scheduler_stats.prefix_cache_stats.queries
                    engine.prefix_cache_hits += scheduler_stats.prefix_cache_stats.hits

            def log(self) -> None: ...

            def log_engine_initialized(self) -> None: ...

        # The context picks defaults: those of offline work let a step read more prompt tokens.
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS, stat_loggers=[Scheduler], enable_multiprocessing=True
        )
        if "sere" in arguments.get("additional_config", {}):
            _refuse_without_plugin(self._engine)
        if config.group_by_prefix and not self._engine.vllm_config.cache_config.enable_prefix_caching:
            self._engine.engine_core.shutdown()
            raise ConfigError(
                f"group_by_prefix needs the engine's prefix cache, which vLLM does not use for {config.model}: leave it out"
            )
        self._loop = EngineLoop(self._engine)
        self._adapters = _lora_requests(config)

    async def warm_up(self) -> None:
        """Answer a prompt once: what engines only do at their first request is part of the start, and so is its failing.

        It makes one token, which takes no decode step, from several, as one alone would look like a decode step: nothing is
        counted, nor is what it asks of the prefix cache.
        """
        from vllm import SamplingParams, TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=[0] * 8)
        await self._loop.generate(prompt, SamplingParams(max_tokens=1))
        self.prefix_cache_queries = self.prefix_cache_hits = 0
        # All that is there by now stays: looking through it for garbage takes half a second each time, in the midst of work.
        gc.collect()
        gc.freeze()

    def apply_chat_template(self, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> str:
        """A prompt of chat messages, by the model's template."""
        arguments = {"add_generation_prompt": True, **arguments}
        return self._engine.get_tokenizer().apply_chat_template(messages, tokenize=False, **arguments)

    def tokenize(self, texts: list[str]) -> list[Any]:
        """Token ids of each text, or the exception that it raises."""
        # A chat template has written the special tokens.
        options = {"add_special_tokens": self._config.messages_column is None}
        try:
            return self._engine.get_tokenizer()(texts, **options)["input_ids"]
        except Exception as error:
            # One of them is to blame, and the others are not.
            return [error] if len(texts) == 1 else [found for text in texts for found in self.tokenize([text])]

    async def answer(self, request: Request, tokens: Any) -> Answer:
        """The answer to a request with these token ids (or the exception that tokenising it raised).

        Raises:
            vllm.v1.engine.exceptions.EngineDeadError: if the engine is dead. All else becomes an answer with an error.
        """
        from vllm import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError

        if request.problem is not None:
            return Answer(error=request.problem)
        try:
            if isinstance(tokens, Exception):
                raise tokens
            adapter = self._adapters[request.lora] if request.lora else None
            prompt = TokensPrompt(prompt_token_ids=tokens)
            output = await self._loop.generate(prompt, self._parameters(request.sampling), lora_request=adapter)
        except EngineDeadError:
            raise
        except Exception as error:
            cause = error.__cause__ or error
            return Answer(error=f"{type(cause).__name__}: {cause}")
        completion = output.outputs[0]
        if completion.finish_reason in ("abort", "error"):
            return Answer(error=f"the engine ended this request with finish_reason {completion.finish_reason}")
        return Answer(
            generated_text=completion.text,
            num_prompt_tokens=len(output.prompt_token_ids),
            num_generated_tokens=len(completion.token_ids),
            finish_reason=completion.finish_reason,
        )

    def _parameters(self, sampling: dict[str, Any]) -> Any:
        """vLLM's `SamplingParams`; made once for rows that have no parameters of their own."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        if self._last_parameters is None or self._last_parameters[0] is not sampling:
            arguments = dict(sampling)
            if "structured_outputs" in arguments:
                arguments["structured_outputs"] = StructuredOutputsParams(**arguments["structured_outputs"])
            made = SamplingParams(**arguments, output_kind=RequestOutputKind.FINAL_ONLY)
            self._last_parameters = sampling, made
        return self._last_parameters[1]

    @property
    def num_steps(self) -> int:
        """Steps so far."""
        return self._loop.num_steps

    def shutdown(self) -> None:
        """End the engine's processes."""
        self._loop.shutdown()


def _refuse_without_plugin(engine: Any) -> None:
    from sere.ops.engine import assert_rerouting

    try:
        assert_rerouting(engine)
    except RuntimeError as error:
        engine.engine_core.shutdown()
        raise ConfigError(str(error)) from error


def _lora_requests(config: GenerateConfig) -> dict[str, Any]:
    from vllm.lora.request import LoRARequest

    adapters = sorted(config.engine.lora_adapters.items())
    return {name: LoRARequest(name, number, path) for number, (name, path) in enumerate(adapters, start=1)}


def why_not_started(error: Exception, *, log: Path, refusals: Path | None) -> str:
    """What a user should know of an engine that did not start.

    Args:
        error: What starting it raised.
        log: What its processes printed.
        refusals: Where the plugin leaves its refusals (`stats_dir`), if it is in use.
    """
    for file in sorted(refusals.glob("*.refused")) if refusals is not None else ():
        # What the plugin in the engine's process refused.
        return file.read_text()
    if isinstance(error, ConfigError):
        return str(error)
    lines = significant_lines(log.read_text(errors="replace")) or [f"{type(error).__name__}: {error}"]
    text = " | ".join(lines)
    if any(word in text for word in _OUT_OF_MEMORY):
        return (
            f"the engine ran out of memory at its start ({lines[-1]}): lower engine.max_model_len or engine.max_num_seqs, "
            "raise engine.tensor_parallel_size, or lower gpu_memory_utilization in engine.engine_kwargs if others use the "
            "GPU; on the CPU lower engine.kv_cache_gib"
        )
    return f"the engine does not start ({text}): see {log} on node {os.uname().nodename}"


def significant_lines(log: str, most: int = 5) -> list[str]:
    """The lines of a log that say what went wrong: the last ones that end a traceback or report an error."""
    found = []
    for line in log.splitlines():
        # vLLM puts process, level, time and file before what is said.
        text = line.split("] ", 1)[-1].strip()
        if text.split(":", 1)[0].rsplit(".", 1)[-1].endswith(("Error", "Exception")) and " " not in text.split(":", 1)[0]:
            found.append(text)
    unique = list(dict.fromkeys(found))
    return unique[-most:]
