"""A replica: one vLLM engine, the rows it works on, and the parts it writes. A plain class; the job makes it a Ray actor.

It answers rows in whatever order they finish and writes them in parts of half of `checkpoint_rows`. What it has written
is finished, whatever happens to it or to the driver.
"""

import asyncio
import gc
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from sere.conf.errors import ConfigError
from sere.conf.schema import GenerateConfig
from sere.pipeline.generate.identity import SIMILARITY
from sere.pipeline.generate.parts import RunFolder
from sere.pipeline.generate.replica.answers import Answer, answer_table
from sere.pipeline.generate.replica.engine_loop import EngineLoop
from sere.pipeline.generate.replica.requests import Request, RequestMaker

_OUT_OF_MEMORY = ("out of memory", "OutOfMemoryError", "No available memory for the cache", "Free memory on device")


@dataclass(frozen=True)
class ReplicaSpec:
    """All a replica needs to know."""

    name: str
    """Unique over all replicas of the job, dead ones and earlier sessions included: its parts begin with it."""
    config: GenerateConfig
    engine_kwargs: dict[str, Any]
    folder: RunFolder
    """Not entered: the driver holds the lock."""
    input_schema: pa.Schema


@dataclass
class ReplicaStatus:
    """What a replica says of itself; sums are since its start."""

    num_rows: int = 0
    num_errors: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    first_request: float | None = None
    """Unix time, as the next."""
    last_answer: float | None = None
    written: list[int] = field(default_factory=list)
    """Numbers of the batches all of whose rows are in parts."""
    first_errors: list[str] = field(default_factory=list)
    counters: dict[int, dict[str, int]] = field(default_factory=dict)
    """SERE's counters per layer, where re-routing is counted."""


class Replica:
    """One engine. Its methods run on one event loop, so nothing here needs a lock."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self._spec = spec
        self._engine: Any = None
        self._requests: Any = None
        self._scheduler: Any = None
        self._last_parameters: tuple[dict[str, Any], Any] | None = None
        self._status = ReplicaStatus()
        self._finished: list[tuple[int, int, Answer]] = []
        self._tables: dict[int, pa.Table] = {}
        self._unwritten: dict[int, int] = {}
        self._num_parts = 0
        self._last_write = time.monotonic()
        self._writing = asyncio.Lock()
        self._scratch = Path(tempfile.mkdtemp(prefix="sere-"))
        self._log = self._stats_dir = None

    async def start(self) -> str:
        """Start the engine; returns the node's name. Called once, before all others.

        Raises:
            ConfigError: if the run directory is not seen from this node, or the engine cannot start.
        """
        spec = self._spec
        if spec.folder.storage.get_json("job.json") is None:
            raise ConfigError(
                f"{spec.folder.storage.shown} is not seen from node {os.uname().nodename}: choose an output on a file system "
                "that all nodes share, or an fsspec URI such as s3://bucket/run"
            )
        self._redirect_output()
        subprocess.Popen([sys.executable, str(Path(__file__).with_name("watchdog.py")), str(os.getpid())])
        try:
            self._start_engine()
        except Exception as error:
            raise ConfigError(self._why_not_started(error)) from error
        await self._warm_up()
        asyncio.get_running_loop().create_task(self._write_in_time())
        return os.uname().nodename

    def _redirect_output(self) -> None:
        """Send what the engine's processes print to a log file; they inherit the two descriptors."""
        self._log = self._scratch / "replica.log"
        storage = self._spec.folder.storage
        if storage.is_local:
            self._log = Path(storage.locate(f"logs/{self._spec.name}.log"))
            self._log.parent.mkdir(parents=True, exist_ok=True)
        opened = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(opened, descriptor)
        os.close(opened)

    def _start_engine(self) -> None:
        # Before vLLM is imported. Its engine is a process of its own, as tests may have turned off.
        os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"})
        # On CPUs vLLM would bind every replica to the same cores; Ray has given each a number of threads.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        logging.getLogger("vllm").setLevel(logging.INFO)
        from vllm import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.metrics.loggers import PrometheusStatLogger

        replica = self

        class Scheduler(PrometheusStatLogger):
            """Keeps the scheduler's latest figures; vLLM's Prometheus logger, which it replaces, slows small models."""

            def __init__(self, *args: Any, **kwargs: Any) -> None: ...

            def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
                if scheduler_stats is not None:
                    replica._scheduler = scheduler_stats

            def log(self) -> None: ...

            def log_engine_initialized(self) -> None: ...

        arguments = dict(self._spec.engine_kwargs)
        sere = arguments.get("additional_config", {}).get("sere")
        if sere is not None:
            self._stats_dir = Path(sere["stats_dir"] or self._scratch) / self._spec.name
            sere = {**sere, "stats_dir": str(self._stats_dir)}
            if sere["policy"] == "sere":
                sere["similarity"] = str(self._fetch(SIMILARITY))
            arguments["additional_config"] = {**arguments["additional_config"], "sere": sere}
        # The context picks defaults: those of offline work let a step read more prompt tokens.
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS, stat_loggers=[Scheduler], enable_multiprocessing=True
        )
        self._requests = EngineLoop(self._engine)
        self._make_requests = RequestMaker(self._spec.config, apply_chat_template=self._apply_chat_template)
        self._adapters = self._lora_requests()

    async def _warm_up(self) -> None:
        """Answer a prompt once: what engines only do at their first request is part of the start, and so is its failing.

        It makes one token, which takes no decode step, from several, as one alone would look like a decode step: nothing is
        counted.
        """
        from vllm import SamplingParams, TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=[0] * 8)
        await self._requests.generate(prompt, SamplingParams(max_tokens=1))
        # All that is there by now stays: looking through it for garbage takes half a second each time, in the midst of work.
        gc.collect()
        gc.freeze()

    def _fetch(self, name: str) -> Path:
        """A file of the run directory on this node's disk."""
        file = self._scratch / name
        file.write_bytes(self._spec.folder.storage.get(name) or b"")
        return file

    def _apply_chat_template(self, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> str:
        arguments = {"add_generation_prompt": True, **arguments}
        return self._engine.get_tokenizer().apply_chat_template(messages, tokenize=False, **arguments)

    def _lora_requests(self) -> dict[str, Any]:
        from vllm.lora.request import LoRARequest

        adapters = sorted(self._spec.config.engine.lora_adapters.items())
        return {name: LoRARequest(name, number, path) for number, (name, path) in enumerate(adapters, start=1)}

    def _why_not_started(self, error: Exception) -> str:
        for file in sorted(self._stats_dir.glob("*.refused")) if self._stats_dir is not None else ():
            # What the plugin in the engine's process refused.
            return file.read_text()
        lines = significant_lines(self._log.read_text(errors="replace")) or [f"{type(error).__name__}: {error}"]
        text = " | ".join(lines)
        if any(word in text for word in _OUT_OF_MEMORY):
            return (
                f"the engine ran out of memory at its start ({lines[-1]}): lower engine.max_model_len or engine.max_num_seqs, "
                "raise engine.tensor_parallel_size, or lower gpu_memory_utilization in engine.engine_kwargs if others use the "
                "GPU; on the CPU lower engine.kv_cache_gib"
            )
        return f"the engine does not start ({text}): see {self._log} on node {os.uname().nodename}"

    async def generate(self, number: int, table: pa.Table) -> ReplicaStatus:
        """Answer a batch's rows. They are finished when this returns, and in a part when `written` has the batch's number.

        Args:
            number: Of the batch.
            table: Rows with the input's columns and those that `sources.read_file` adds.

        Raises:
            vllm.v1.engine.exceptions.EngineDeadError: if the engine is dead: so is this replica then.
        """
        self._tables[number] = table
        self._unwritten[number] = len(table)
        if self._status.first_request is None:
            self._status.first_request = time.time()
        from vllm.v1.engine.exceptions import EngineDeadError

        requests = self._make_requests(table)
        texts = [request.prompt for request in requests]
        # All at once: one by one, as the engine would do it, takes several times as long.
        tokens = await asyncio.to_thread(self._tokenize, texts)
        try:
            answers = (self._finish(number, index, *pair) for index, pair in enumerate(zip(requests, tokens, strict=True)))
            await asyncio.gather(*answers)
        except EngineDeadError:
            # What was finished before is not done again.
            await self.write()
            raise
        return await self.status()

    def _tokenize(self, texts: list[str]) -> list[Any]:
        """Token ids of each text, or the exception that it raises."""
        # A chat template has written the special tokens.
        options = {"add_special_tokens": self._spec.config.messages_column is None}
        try:
            return self._engine.get_tokenizer()(texts, **options)["input_ids"]
        except Exception as error:
            # One of them is to blame, and the others are not.
            return [error] if len(texts) == 1 else [found for text in texts for found in self._tokenize([text])]

    async def _finish(self, number: int, index: int, request: Request, tokens: Any) -> None:
        answer = await self._answer(request, tokens)
        status = self._status
        status.num_rows += 1
        status.prompt_tokens += answer.num_prompt_tokens or 0
        status.generated_tokens += answer.num_generated_tokens or 0
        status.last_answer = time.time()
        if answer.error is not None:
            status.num_errors += 1
            if len(status.first_errors) < 3:
                status.first_errors.append(answer.error)
        self._finished.append((number, index, answer))
        # At half of them: others finish while these are being written.
        if len(self._finished) >= max(1, self._spec.config.checkpoint_rows // 2):
            await self.write()

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

    async def _answer(self, request: Request, tokens: Any) -> Answer:
        from vllm import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError

        if request.problem is not None:
            return Answer(error=request.problem)
        try:
            if isinstance(tokens, Exception):
                raise tokens
            adapter = self._adapters[request.lora] if request.lora else None
            prompt = TokensPrompt(prompt_token_ids=tokens)
            output = await self._requests.generate(prompt, self._parameters(request.sampling), lora_request=adapter)
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

    async def write(self) -> None:
        """Write what is finished and not yet written as a part."""
        async with self._writing:
            rows, self._finished = self._finished, []
            self._last_write = time.monotonic()
            if not rows:
                return
            table = answer_table(rows, self._tables, self._spec.input_schema, self._spec.config.id_column)
            try:
                name = f"{self._spec.name}-{self._num_parts:06d}"
                await asyncio.to_thread(self._spec.folder.write_part, name, table)
            except BaseException:
                # Under the same name once more: it may be there, and not have been confirmed.
                self._finished = rows + self._finished
                raise
            self._num_parts += 1
            for number, _, _ in rows:
                self._unwritten[number] -= 1
                if not self._unwritten[number]:
                    del self._unwritten[number], self._tables[number]
                    self._status.written.append(number)

    async def _write_in_time(self) -> None:
        interval = self._spec.config.checkpoint_interval_s
        while True:
            await asyncio.sleep(min(interval, 1.0))
            if time.monotonic() - self._last_write >= interval:
                try:
                    await self.write()
                except Exception:
                    # Kept, and raised where somebody listens: when the rows are asked for.
                    logging.getLogger(__name__).exception("finished rows cannot be written")

    async def status(self) -> ReplicaStatus:
        """Figures of now. A batch number is told once."""
        status = self._status
        if self._scheduler is not None:
            status.num_running = self._scheduler.num_running_reqs
            status.num_waiting = self._scheduler.num_waiting_reqs
            status.kv_cache_usage = self._scheduler.kv_cache_usage
        if self._stats_dir is not None:
            from sere.ops.engine.counters import read_counters

            status.counters = {layer.layer: layer.counts for layer in read_counters(self._stats_dir)}
        told = ReplicaStatus(**{**vars(status), "written": status.written})
        status.written = []
        return told

    async def flush(self) -> ReplicaStatus:
        """Write what is finished, and say so."""
        await self.write()
        return await self.status()

    async def stop(self) -> ReplicaStatus:
        """Write what is finished and end the engine, which brings the last counters."""
        await self.write()
        await asyncio.to_thread(self._requests.shutdown)
        storage = self._spec.folder.storage
        if not storage.is_local:
            storage.put(f"logs/{self._spec.name}.log", self._log.read_bytes())
        last = await self.status()
        shutil.rmtree(self._scratch, ignore_errors=True)
        return last


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
