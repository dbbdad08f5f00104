"""vLLM's engine in a thread, asked from an event loop.

`LLMEngine`, which `vllm.LLM` is made of, costs less per step than `AsyncLLM`, which wakes an event loop at every step
(docs/generation.md); offline, only whole answers matter.
"""

import asyncio
import queue
import threading
from typing import Any

_WATCH_S = 1.0


class EngineLoop:
    """One engine. `generate` may be awaited any number of times at once, on the event loop that made this."""

    def __init__(self, engine: Any) -> None:
        """Take an engine, and start its thread.

        Args:
            engine: A `vllm.v1.engine.llm_engine.LLMEngine`, used by nobody else from now on.
        """
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._num_requests = 0
        self.num_steps = 0
        """Of the engine, so far."""
        self._dead: Exception | None = None
        threading.Thread(target=self._run, name="engine", daemon=True).start()
        self._watching = self._loop.create_task(self._watch())

    async def generate(self, prompt: Any, parameters: Any, *, lora_request: Any = None) -> Any:
        """The finished `RequestOutput` of a prompt.

        Raises:
            vllm.v1.engine.exceptions.EngineDeadError: if the engine is dead, or dies.
            Exception: what vLLM raises for a request that it does not take.
        """
        if self._dead is not None:
            raise self._dead
        self._num_requests += 1
        name = str(self._num_requests)
        self._waiting[name] = self._loop.create_future()
        self._inbox.put((name, prompt, parameters, lora_request))
        return await self._waiting[name]

    def shutdown(self) -> None:
        """End the engine's processes."""
        self._loop.call_soon_threadsafe(self._watching.cancel)
        self._inbox.put(None)
        self._engine.engine_core.shutdown()

    def _run(self) -> None:
        engine, alive = self._engine, True
        while alive:
            try:
                # Idle it waits for requests; at work it takes those that are there, between two steps.
                while not engine.has_unfinished_requests() or not self._inbox.empty():
                    item = self._inbox.get()
                    if item is None:
                        return
                    self._add(*item)
                finished = [(output.request_id, output, None) for output in engine.step() if output.finished]
                self.num_steps += 1
                if finished:
                    self._tell(self._resolve, finished)
            except Exception as error:
                self._tell(self._die, error)
                alive = False

    def _add(self, name: str, prompt: Any, parameters: Any, lora_request: Any) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            self._engine.add_request(name, prompt, parameters, lora_request=lora_request)
        except EngineDeadError:
            raise
        except Exception as error:
            # It may have failed half way (a number too large to be sent): half a request would be waited for without end.
            self._engine.abort_request([name])
            self._tell(self._resolve, [(name, None, error)])

    def _tell(self, function: Any, argument: Any) -> None:
        """Call on the event loop; when that is closed nobody waits."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, argument)

    def _resolve(self, finished: list[tuple[str, Any, Exception | None]]) -> None:
        for name, output, error in finished:
            future = self._waiting.pop(name, None)
            if future is None or future.done():
                continue
            if error is None:
                future.set_result(output)
            else:
                future.set_exception(error)

    def _die(self, error: Exception) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._dead is None:
            self._dead = error if isinstance(error, EngineDeadError) else EngineDeadError(f"{type(error).__name__}: {error}")
            self._dead.__cause__ = error if error is not self._dead else None
            self._resolve([(name, None, self._dead) for name in list(self._waiting)])

    async def _watch(self) -> None:
        """Notice an engine that was killed: `step` would wait for it for ever."""
        while self._dead is None:
            await asyncio.sleep(_WATCH_S)
            try:
                self._engine.engine_core.ensure_alive()
            except Exception as error:
                self._die(error)
