"""The event loop's side of an engine: what comes back, what is refused, and an engine that dies in its several ways."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from sere.pipeline.generate.replica.engine import ReplicaEngine
from sere.pipeline.generate.replica.engine_loop import EngineLoop


class Engine:
    """In place of vLLM's: upper-cases a prompt per step, and does what prompts ask for."""

    def __init__(self):
        self.waiting, self.is_dead, self.released = [], False, threading.Event()
        self.engine_core = SimpleNamespace(ensure_alive=self.ensure_alive, shutdown=self.released.set)

    def ensure_alive(self):
        if self.is_dead:
            raise EngineDeadError()

    def add_request(self, name, prompt, parameters, lora_request=None):
        if prompt == "refuse":
            # Half way, as vLLM may.
            self.waiting.append((name, "kill"))
            raise ValueError("too long")
        self.waiting.append((name, prompt))

    def abort_request(self, names):
        self.waiting = [item for item in self.waiting if item[0] not in names]

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        name, prompt = self.waiting.pop(0)
        if prompt == "break":
            raise RuntimeError("broken")
        if prompt == "kill":
            # As after kill -9: no answer ever comes.
            self.is_dead = True
            self.released.wait()
        return [SimpleNamespace(request_id=name, finished=True, text=prompt.upper())]


def ask(*prompts):
    async def run():
        engine = Engine()
        requests = EngineLoop(engine)
        found = await asyncio.gather(*(requests.generate(prompt, None) for prompt in prompts), return_exceptions=True)
        late = (await asyncio.gather(requests.generate("late", None), return_exceptions=True))[0]
        requests.shutdown()
        return found, late

    return asyncio.run(asyncio.wait_for(run(), 30))


def test_answers_come_back_and_a_refused_request_fails_alone():
    found, late = ask("a", "refuse", "b")
    assert [found[0].text, found[2].text, late.text] == ["A", "B", "LATE"]
    assert isinstance(found[1], ValueError) and str(found[1]) == "too long"


@pytest.mark.parametrize(("prompt", "cause"), [("break", "RuntimeError: broken"), ("kill", "EngineCore")])
def test_a_dead_engine_fails_all_that_wait_and_all_that_come(prompt, cause):
    found, late = ask("a", prompt, "b")
    assert found[0].text == "A"
    assert all(isinstance(error, EngineDeadError) for error in (*found[1:], late)) and cause in str(late)


def test_a_text_that_the_tokenizer_refuses_fails_alone():
    def tokenizer(texts, *, add_special_tokens):
        if "bad" in texts:
            raise ValueError("bad text")
        return {"input_ids": [[len(text)] for text in texts]}

    # Not started: tokenising needs the tokenizer alone.
    engine = ReplicaEngine.__new__(ReplicaEngine)
    engine._config = SimpleNamespace(messages_column=None)
    engine._engine = SimpleNamespace(get_tokenizer=lambda: tokenizer)
    assert engine.tokenize(["a", "bb"]) == [[1], [2]]
    one, error, other = engine.tokenize(["a", "bad", "bb"])
    assert (one, str(error), other) == ([1], "bad text", [2])
