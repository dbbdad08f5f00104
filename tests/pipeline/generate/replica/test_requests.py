"""Rows to requests: prompts, sampling and adapters, and a reason for every row that has none."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sere.conf.schema import EngineConfig, GenerateConfig, SamplingConfig, StructuredOutputConfig
from sere.pipeline.data.source import PROBLEM
from sere.pipeline.generate.replica.requests import RequestMaker, prompt_texts


def make(rows, *, chat=None, **changes):
    config = GenerateConfig(**{"model": "m", "output": "o", "data": "d", **changes})
    return RequestMaker(config, apply_chat_template=chat)(pa.Table.from_pylist(rows))


def problems(rows, **changes):
    return [request.problem for request in make(rows, **changes)]


def test_prompt_column():
    rows = [{"prompt": "a"}, {"prompt": None}, {"prompt": ""}, {"prompt": "b", "sere_problem": "line 4 is bad"}]
    requests = make([{"sere_problem": "", **row} for row in rows])
    assert [request.prompt for request in requests] == ["a", "", "", ""]
    assert [request.problem for request in requests] == [None, "prompt is null", "prompt is empty", "line 4 is bad"]
    assert requests[0].sampling["max_tokens"] == 256 and "structured_outputs" not in requests[0].sampling


def test_template():
    rows = [{"q": "1+1", "n": 2}, {"q": None, "n": 0}]
    assert make(rows, template="{{ n }}: {{ q }}=")[0].prompt == "2: 1+1="
    assert make(rows, template="{% if q %}{{ q }}{% endif %}")[1].problem == "template: the prompt is empty"
    assert "template: integer division" in problems(rows, template="{{ 1 // n }}")[1]
    # What a template could reach out with.
    assert "template: access to attribute" in problems(rows, template="{{ ''.__class__.__mro__ }}")[0]


def test_chat():
    def chat(messages, arguments):
        if messages[0]["role"] == "alien":
            raise ValueError("roles must alternate")
        return "|".join(m["content"] for m in messages) + str(arguments)

    good = [{"role": "user", "content": "hi"}]
    assert make([{"m": good}], chat=chat, messages_column="m", chat_template_kwargs={"x": 1})[0].prompt == "hi{'x': 1}"
    assert make([{"m": '[{"role": "user", "content": "hi"}]'}], chat=chat, messages_column="m")[0].prompt == "hi{}"
    bad = [None, "[]", "no json", "7", '[{"role": "user"}]', '[{"role": "alien", "content": "x"}]']
    found = problems([{"m": value} for value in bad], chat=chat, messages_column="m")
    for problem, words in zip(
        found,
        ["m is null", "list of messages", "not JSON", "list of messages", "role and content", "must alternate"],
        strict=True,
    ):
        assert words in problem


def test_sampling_of_a_row():
    sampling = SamplingConfig(max_tokens=9, stop=("x",), structured_output=StructuredOutputConfig(regex="a+"))
    rows = [
        {"prompt": "p", "s": '{"temperature": 1, "stop": ["y"]}'},
        {"prompt": "p", "s": None},
        {"prompt": "p", "s": '{"structured_output": {"choice": ["a", "b"]}}'},
    ]
    changed, plain, choice = (request.sampling for request in make(rows, sampling=sampling, sampling_column="s"))
    assert changed["temperature"] == 1.0 and changed["stop"] == ["y"] and changed["max_tokens"] == 9
    assert plain["temperature"] == 0.0 and plain["stop"] == ["x"] and plain["structured_outputs"] == {"regex": "a+"}
    assert choice["structured_outputs"] == {"choice": ["a", "b"]}
    struct = make([{"prompt": "p", "s": {"top_k": 5, "seed": None}}], sampling_column="s")[0]
    assert struct.sampling["top_k"] == 5 and struct.problem is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"temprature": 1}', "unknown sampling parameter 'temprature'"),
        ('{"temperature": "hot"}', "temperature must be float, got 'hot'"),
        ('{"temperature": -1}', "temperature must be at least 0"),
        ('{"max_tokens": 1.5}', "max_tokens must be int"),
        ('{"max_tokens": 0}', "max_tokens must be between 1 and"),
        ('{"ignore_eos": 1}', "ignore_eos must be bool"),
        ('{"stop": "x"}', "stop must be a list of str"),
        ('{"structured_output": {"json": {}, "regex": "x"}}', "exactly one of"),
        ('{"structured_output": {"xml": 1}}', "must have one of json"),
        ("[1, 2]", "s must be a mapping"),
        ("{", "s is not JSON"),
    ],
)
def test_bad_sampling_of_a_row(text, words):
    (problem,) = problems([{"prompt": "p", "s": text}], sampling_column="s")
    assert words in problem and "\n" not in problem


@given(st.text())
def test_no_text_stops_the_job(text):
    for column in ("sampling_column", "messages_column"):
        (request,) = make([{"prompt": "p", "x": text}], chat=lambda *_: "c", **{column: "x"})
        assert request.problem is None or isinstance(request.problem, str)


def test_adapters():
    engine = EngineConfig(lora_adapters={"a": "/a"})
    found = make(
        [{"prompt": "p", "l": "a"}, {"prompt": "p", "l": None}, {"prompt": "p", "l": "b"}], engine=engine, lora_column="l"
    )
    assert [request.lora for request in found[:2]] == ["a", None]
    assert "'b' is none of engine.lora_adapters (a)" in found[2].problem


@pytest.mark.parametrize(
    "value",
    ['{"seed": 1%s}' % ("0" * 30), '{"max_tokens": 1%s}' % ("0" * 400), "[" * 100_000, '{"structured_output": {"choice": 5}}'],
)
def test_a_row_that_asks_for_the_impossible_fails_alone(value):
    table = pa.table({"prompt": ["a", "b"], "s": [value, None], PROBLEM: ["", ""]})
    one, two = RequestMaker(GenerateConfig(model="m", data="d", output="o", sampling_column="s"))(table)
    assert one.problem and two.problem is None and two.prompt == "b"


def test_columns_that_are_not_asked_for_do_no_harm():
    far = pa.array([2**62], pa.timestamp("s"))
    (request,) = RequestMaker(GenerateConfig(model="m", data="d", output="o"))(
        pa.table({"prompt": ["a"], "far": far, PROBLEM: [""]})
    )
    assert request.problem is None


def texts(rows, **changes):
    config = GenerateConfig(**{"model": "m", "output": "o", "data": "d", **changes})
    return prompt_texts(config)(pa.Table.from_pylist([{"sere_problem": "", **row} for row in rows])).to_pylist()


def test_texts_that_begin_as_prompts_do():
    rows = [{"prompt": "é"}, {"prompt": None}, {"prompt": ""}, {"prompt": "b", "sere_problem": "line 4 is bad"}]
    assert texts(rows) == ["é".encode(), b"", b"", b""]
    assert texts([{"q": "1+1"}], template="Q: {{ q }}") == [b"Q: 1+1"]
    assert texts([{"q": 1}], template=r"{{ '\ud83d' }}{{ q }}") == [b"\xed\xa0\xbd1"], "half of a character"
    assert texts([{"q": 0}, {"q": 1}], template="{{ 1 // q }}") == [b"", b"1"], "a row's own trouble"
    # However a row is sampled.
    assert texts([{"prompt": "a", "s": "no json"}], sampling_column="s") == [b"a"]


def test_texts_of_chat_messages():
    """A longer system prompt in common is a longer beginning; without a chat template."""
    system = {"role": "system", "content": "be brief"}
    messages = [[system, {"role": "user", "content": text}] for text in ("one", "other")]
    one, other, none = texts([{"m": messages[0]}, {"m": messages[1]}, {"m": None}], messages_column="m")
    assert one == b"system\0be brief\0user\0one" and other == b"system\0be brief\0user\0other" and none == b""


def test_adapters_share_nothing():
    engine = EngineConfig(lora_adapters={"x": "/x", "y": "/y"})
    rows = [{"prompt": "a", "l": "x"}, {"prompt": "a", "l": "y"}, {"prompt": "a", "l": None}, {"prompt": "a", "l": "z"}]
    assert texts(rows, lora_column="l", engine=engine) == [b"x\0a", b"y\0a", b"\0a", b"\0"]
