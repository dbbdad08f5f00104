"""A replica: one vLLM engine, the rows it works on, and the parts it writes. A plain class; the job makes it a Ray actor.

It answers rows in whatever order they finish and writes them in parts of `part_mib`, sooner where `checkpoint_rows` or
`checkpoint_interval_s` say so. What it has written is finished, whatever happens to it or to the driver.
"""

import asyncio
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from sere.conf.errors import ConfigError
from sere.conf.schema import RerouteConfig
from sere.pipeline.generate.attempts import Attempts
from sere.pipeline.generate.columns import references_of
from sere.pipeline.generate.dispatch.work import joined
from sere.pipeline.generate.identity import SIMILARITY
from sere.pipeline.generate.replica.answers import Answer, answer_table
from sere.pipeline.generate.replica.engine import ReplicaEngine, why_not_started
from sere.pipeline.generate.replica.requests import Request, RequestMaker
from sere.pipeline.generate.replica.spec import ReplicaSpec, ReplicaStatus
from sere.pipeline.runtime.job_folder import JOB_FILE

# Rows that are all alike become next to nothing in a file, and would fill the memory before it is full.
_MOST_COMPRESSION = 8.0


class Replica:
    """One engine. Its methods run on one event loop, so nothing here needs a lock."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self._spec = spec
        self._engine: Any = None
        self._status = ReplicaStatus()
        self._finished: list[tuple[int, int, Answer]] = []
        self._tables: dict[int, pa.Table] = {}
        self._unwritten: dict[int, int] = {}
        # Of a row, by table; of all that are finished; and how many bytes become one of a part.
        self._row_bytes: dict[int, float] = {}
        self._finished_bytes = 0.0
        self._compression = 1.0
        self._attempts = Attempts(spec.parts.storage, spec.name)
        self._num_parts = 0
        self._last_write = time.monotonic()
        self._writing = asyncio.Lock()
        self._scratch = Path(tempfile.mkdtemp(prefix="sere-"))
        self._log = self._scratch / "replica.log"
        self._stats_dir: Path | None = None

    async def node(self) -> str:
        """The node's name: known as soon as there is room for this replica, long before its engine is there."""
        return os.uname().nodename

    async def start(self) -> str:
        """Start the engine; returns the node's name. Called once, before all others.

        Raises:
            ConfigError: if the run directory is not seen from this node, or the engine cannot start.
        """
        spec = self._spec
        if spec.parts.storage.get_json(JOB_FILE) is None:
            raise ConfigError(
                f"{spec.parts.storage.shown} is not seen from node {os.uname().nodename}: choose an output on a file system "
                "that all nodes share, or an fsspec URI such as s3://bucket/run"
            )
        self._redirect_output()
        watchdog = Path(__file__).with_name("watchdog.py")
        subprocess.Popen([sys.executable, str(watchdog), str(os.getpid()), str(self._scratch)])
        try:
            self._engine = ReplicaEngine(spec.config, self._arguments(), scratch=self._scratch)
        except Exception as error:
            raise ConfigError(why_not_started(error, log=self._log, refusals=self._stats_dir)) from error
        self._make_requests = RequestMaker(spec.config, apply_chat_template=self._engine.apply_chat_template)
        await self._engine.warm_up()
        asyncio.get_running_loop().create_task(self._write_in_time())
        return os.uname().nodename

    def _redirect_output(self) -> None:
        """Send what the engine's processes print to a log file; they inherit the two descriptors."""
        storage = self._spec.parts.storage
        if storage.is_local:
            self._log = Path(storage.locate(f"logs/{self._spec.name}.log"))
            self._log.parent.mkdir(parents=True, exist_ok=True)
        opened = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(opened, descriptor)
        os.close(opened)

    def _arguments(self) -> dict[str, Any]:
        """The engine's arguments, with counters and artifact on this node's disk."""
        arguments = dict(self._spec.engine_arguments)
        sere = arguments.get("additional_config", {}).get("sere")
        if sere is not None:
            self._stats_dir = Path(sere["stats_dir"] or self._scratch) / self._spec.name
            sere = {**sere, "stats_dir": str(self._stats_dir)}
            if RerouteConfig.from_dict(sere).needs_tables:
                sere["similarity"] = str(self._fetch(SIMILARITY))
            arguments["additional_config"] = {**arguments["additional_config"], "sere": sere}
        return arguments

    def _fetch(self, name: str) -> Path:
        """A file of the run directory on this node's disk."""
        file = self._scratch / name
        file.write_bytes(self._spec.parts.storage.get(name) or b"")
        return file

    async def generate(
        self, number: int, num_tries: int, alone: bool, spans: list[tuple[int, int]], *blocks: pa.Table
    ) -> ReplicaStatus:
        """Answer a batch's rows. They are finished when this returns, and in a part when `written` has the batch's number.

        Args:
            number: Of the batch.
            num_tries: Replicas that died with these rows.
            alone: This replica has no others meanwhile.
            spans: First row and number of rows in each of the blocks.
            blocks: Tables with the input's columns and those that `read_file` adds.

        Raises:
            vllm.v1.engine.exceptions.EngineDeadError: if the engine is dead: so is this replica then.
        """
        table = joined(spans, blocks)
        self._tables[number] = table
        self._unwritten[number] = len(table)
        self._row_bytes[number] = table.nbytes / len(table)
        # Before the engine sees them.
        await asyncio.to_thread(self._attempts.begin, number, table, num_tries, alone=alone)
        if self._status.first_request is None:
            self._status.first_request = time.time()
        from vllm.v1.engine.exceptions import EngineDeadError

        requests = self._make_requests(table)
        texts = [request.prompt for request in requests]
        # All at once: one by one, as the engine would do it, takes several times as long.
        tokens = await asyncio.to_thread(self._engine.tokenize, texts)
        try:
            answers = (self._finish(number, index, *pair) for index, pair in enumerate(zip(requests, tokens, strict=True)))
            await asyncio.gather(*answers)
        except EngineDeadError:
            # What was finished before is not done again.
            await self.write()
            raise
        # Whatever comes now is not these rows' fault.
        self._attempts.end(number)
        return await self.status()

    async def _finish(self, number: int, index: int, request: Request, tokens: Any) -> None:
        answer = await self._engine.answer(request, tokens)
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
        self._finished_bytes += self._row_bytes[number] + len(answer.generated_text or "")
        if self._is_part_full():
            await self.write()

    def _is_part_full(self) -> bool:
        config = self._spec.config
        # At half of them: others finish while these are being written.
        is_many = config.checkpoint_rows is not None and len(self._finished) >= max(1, config.checkpoint_rows // 2)
        return is_many or self._finished_bytes >= config.part_mib * 2**20 * self._compression

    async def write(self) -> None:
        """Write what is finished and not yet written as a part."""
        async with self._writing:
            rows, self._finished = self._finished, []
            num_bytes, self._finished_bytes = self._finished_bytes, 0.0
            self._last_write = time.monotonic()
            if not rows:
                return
            config, schema = self._spec.config, self._spec.input_schema
            try:
                table = answer_table(rows, self._tables, schema, config.id_column, references_of(config, schema))
                name = f"{self._spec.name}-{self._num_parts:06d}"
                _, size = await asyncio.to_thread(self._spec.parts.write, name, table)
            except BaseException:
                # Under the same name once more: it may be there, and not have been confirmed.
                self._finished = rows + self._finished
                self._finished_bytes += num_bytes
                raise
            self._num_parts += 1
            self._compression = min(table.nbytes / size, _MOST_COMPRESSION)
            self._status.num_written += len(rows)
            for number, _, _ in rows:
                self._unwritten[number] -= 1
                if not self._unwritten[number]:
                    del self._unwritten[number], self._tables[number], self._row_bytes[number]
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
        status, scheduler = self._status, self._engine.scheduler
        status.num_steps = self._engine.num_steps
        if scheduler is not None:
            status.num_running = scheduler.num_running_reqs
            status.num_waiting = scheduler.num_waiting_reqs
            status.kv_cache_usage = scheduler.kv_cache_usage
            status.prefix_cache_queries = self._engine.prefix_cache_queries
            status.prefix_cache_hits = self._engine.prefix_cache_hits
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
        await asyncio.to_thread(self._attempts.forget)
        await asyncio.to_thread(self._engine.shutdown)
        storage = self._spec.parts.storage
        if not storage.is_local:
            storage.put(f"logs/{self._spec.name}.log", self._log.read_bytes())
        last = await self.status()
        shutil.rmtree(self._scratch, ignore_errors=True)
        return last
