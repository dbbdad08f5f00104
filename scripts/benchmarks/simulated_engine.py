"""An engine in the place of vLLM's that answers at once, or after a given time: for benchmarks of everything around engines.

An answer is a function of its prompt alone (`answer_to`), so whoever knows the prompts knows what is right.
"""

import asyncio
import hashlib
import os
import sys
from types import ModuleType
from typing import Any

from ray import cloudpickle

from sere.pipeline.generate.replica import actor
from sere.pipeline.generate.replica.answers import Answer
from sere.pipeline.generate.replica.requests import Request, RequestMaker


def answer_to(prompt: str) -> Answer:
    """What every simulated engine answers to a prompt."""
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    return Answer(digest[:40], num_prompt_tokens=20, num_generated_tokens=10, finish_reason="stop")


class SimulatedEngine:
    """What a replica asks of its engine. `num_steps` goes up as in one that works."""

    scheduler = None

    def __init__(self, delay_s: float) -> None:
        self.num_steps = 0
        self._delay_s = delay_s

    def tokenize(self, texts: list[str]) -> list[Any]:
        return [None] * len(texts)

    async def answer(self, request: Request, tokens: Any) -> Answer:
        answer = answer_to(request.prompt)
        if self._delay_s:
            # Rows of a batch end one after the other, the last after the delay.
            await asyncio.sleep(self._delay_s * int(answer.generated_text[:2], 16) / 255)
        self.num_steps += 1
        return answer

    def shutdown(self) -> None: ...


class SimulatedDeathError(Exception):
    """Stands in for vLLM's error of a dead engine; nothing raises it."""


class SimulatedReplica(actor.Replica):
    """A replica but for its engine."""

    delay_s = 0.0

    async def start(self) -> str:
        # The replica catches an error of vLLM's by its type. Importing vLLM for it would cost more than all the rest.
        name = "vllm.v1.engine.exceptions"
        sys.modules.setdefault(name, ModuleType(name)).__dict__.setdefault("EngineDeadError", SimulatedDeathError)
        self._engine = SimulatedEngine(self.delay_s)
        # Nothing is printed there, and on an object store it is kept at the end.
        self._log.touch()
        self._make_requests = RequestMaker(self._spec.config)
        asyncio.get_running_loop().create_task(self._write_in_time())
        return os.uname().nodename


def simulate_engines(*, delay_s: float = 0.0) -> None:
    """Give the replicas that this process starts from now on simulated engines.

    Args:
        delay_s: Seconds after which a batch is answered; its rows end one after the other until then.
    """
    SimulatedReplica.delay_s = delay_s
    # Workers cannot import this file by its name, and get the delay along with the class.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    actor.Replica = SimulatedReplica
