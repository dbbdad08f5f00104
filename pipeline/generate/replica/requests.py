"""From a row to a request: the prompt, how it is sampled, and why a row has none. Needs neither a cluster nor vLLM."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sere.conf.errors import ConfigError
from sere.conf.schema import GenerateConfig, SamplingConfig, StructuredOutputConfig
from sere.pipeline.data.source import PROBLEM
from sere.pipeline.generate.columns import template_columns

ChatTemplate = Callable[[list[dict[str, Any]], dict[str, Any]], str]


@dataclass(frozen=True)
class Request:
    """What the engine is asked; with a problem it is not asked at all."""

    prompt: str = ""
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of vLLM's `SamplingParams`; `structured_outputs`, if there, are those of `StructuredOutputsParams`."""
    lora: str | None = None
    """Name of an adapter."""
    problem: str | None = None


class _BadRowError(ValueError):
    """Why a row cannot be answered."""


class RequestMaker:
    """Makes requests of rows as the config says."""

    def __init__(self, config: GenerateConfig, *, apply_chat_template: ChatTemplate | None = None) -> None:
        """Compile the template, if there is one.

        Args:
            config: Says where prompts, sampling parameters and adapters come from.
            apply_chat_template: From messages and further arguments to a prompt; needed with `messages_column`.
        """
        self._config = config
        self._apply_chat_template = apply_chat_template
        self._sampling = _arguments(config.sampling)
        self._columns = {PROBLEM, config.sampling_column, config.lora_column, config.messages_column or config.prompt_column}
        self._template = None
        if config.template is not None:
            from jinja2 import StrictUndefined
            from jinja2.sandbox import SandboxedEnvironment

            self._columns |= template_columns(config.template)
            self._template = SandboxedEnvironment(undefined=StrictUndefined).from_string(config.template)

    def __call__(self, table: pa.Table) -> list[Request]:
        """One request a row, in order."""
        # No other columns: a value in them that Python cannot hold does no harm.
        table = table.select([name for name in table.column_names if name in self._columns])
        return [self._request(table, index) for index in range(len(table))]

    def _request(self, table: pa.Table, index: int) -> Request:
        try:
            (row,) = table.slice(index, 1).to_pylist()
            problem = row.pop(PROBLEM, "")
            if problem:
                return Request(problem=problem)
            return Request(self._prompt(row), self._sampling_of(row), self._lora(row))
        except _BadRowError as error:
            return Request(problem=str(error))
        except Exception as error:
            # What is in a row is its own trouble, whatever it is.
            return Request(problem=f"{type(error).__name__}: {error}")

    def _prompt(self, row: dict[str, Any]) -> str:
        config = self._config
        if self._template is not None:
            try:
                prompt = self._template.render(row)
            except Exception as error:
                # A template may do anything, and so may its errors.
                raise _BadRowError(f"template: {error or type(error).__name__}") from error
            if not prompt:
                raise _BadRowError("template: the prompt is empty")
            return prompt
        if config.messages_column is not None:
            return self._chat(_from_json(row[config.messages_column], config.messages_column))
        prompt = row[config.prompt_column]
        if prompt is None or prompt == "":
            raise _BadRowError(f"{config.prompt_column} is {'null' if prompt is None else 'empty'}")
        return prompt

    def _chat(self, messages: Any) -> str:
        column = self._config.messages_column
        if messages is None:
            raise _BadRowError(f"{column} is null")
        if not isinstance(messages, list) or not messages:
            raise _BadRowError(f"{column} must be a list of messages, got {messages!r}")
        for message in messages:
            known = isinstance(message, dict) and isinstance(message.get("role"), str)
            if not known or not isinstance(message.get("content"), str):
                raise _BadRowError(f"{column} must have messages with role and content, both text, got {message!r}")
        assert self._apply_chat_template is not None
        # Parquet gives every message all keys that any has.
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            return self._apply_chat_template(messages, self._config.chat_template_kwargs)
        except Exception as error:
            raise _BadRowError(f"chat template: {error or type(error).__name__}") from error

    def _sampling_of(self, row: dict[str, Any]) -> dict[str, Any]:
        column = self._config.sampling_column
        values = _from_json(row[column], column) if column is not None else None
        if isinstance(values, list) and all(isinstance(pair, tuple) for pair in values):
            # A map of Arrow's.
            values = dict(values)
        if values is not None and not isinstance(values, dict):
            raise _BadRowError(f"{column} must be a mapping of sampling parameters, got {values!r}")
        changes = {key: value for key, value in (values or {}).items() if value is not None}
        if not changes:
            return self._sampling
        try:
            return _arguments(_changed(self._config.sampling, changes))
        except ConfigError as error:
            raise _BadRowError(f"{column}: {error}") from error

    def _lora(self, row: dict[str, Any]) -> str | None:
        column = self._config.lora_column
        name = row[column] if column is not None else None
        if name is not None and name not in self._config.engine.lora_adapters:
            raise _BadRowError(
                f"{column} {name!r} is none of engine.lora_adapters ({', '.join(self._config.engine.lora_adapters)})"
            )
        return name


def prompt_texts(config: GenerateConfig) -> Callable[[pa.Table], pa.Array]:
    """A function from rows to texts that begin alike where the engine's prefix cache finds what the rows share.

    A text is the row's adapter and prompt as bytes; it is empty where there is none. Of chat messages it is what they say, one
    after the other: no chat template is needed to tell which begin alike.
    """

    def said(messages: list[dict[str, Any]], arguments: dict[str, Any]) -> str:
        return "\0".join(f"{message['role']}\0{message['content']}" for message in messages)

    # How a row is sampled changes no prefix.
    make_requests = RequestMaker(dataclasses.replace(config, sampling_column=None), apply_chat_template=said)

    def texts(table: pa.Table) -> pa.Array:
        requests = make_requests(table)
        adapters = ["" if config.lora_column is None else f"{request.lora or ''}\0" for request in requests]
        # Half of a character, which a template may leave, is no text for Arrow.
        prompts = [f"{a}{r.prompt}".encode("utf-8", "surrogatepass") for a, r in zip(adapters, requests, strict=True)]
        return pa.array(prompts, pa.large_binary())

    return texts


def _from_json(value: Any, column: str) -> Any:
    """A value, or what its JSON text says."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise _BadRowError(f"{column} is not JSON: {error}") from error


def _arguments(sampling: SamplingConfig) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams`."""
    values = {field.name: getattr(sampling, field.name) for field in dataclasses.fields(sampling)}
    structured = values.pop("structured_output")
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return values | ({"structured_outputs": structured.to_dict()} if structured is not None else {})


def _changed(sampling: SamplingConfig, changes: dict[str, Any]) -> SamplingConfig:
    """The parameters with some of them changed, checked like a config's."""
    fields = {field.name: field for field in dataclasses.fields(SamplingConfig)}
    values = {}
    for name, value in changes.items():
        if name not in fields:
            raise ConfigError(f"unknown sampling parameter {name!r} (there are: {', '.join(fields)})")
        values[name] = _typed(name, value, getattr(SamplingConfig(), name))
    return dataclasses.replace(sampling, **values)


def _typed(name: str, value: Any, default: Any) -> Any:
    wrong = ConfigError(f"{name} must be {'int' if default is None else type(default).__name__}, got {value!r}")
    if name == "structured_output":
        if not isinstance(value, dict):
            raise ConfigError(f"{name} must be a mapping, got {value!r}")
        given = {key: item for key, item in value.items() if item is not None}
        if set(given) - {field.name for field in dataclasses.fields(StructuredOutputConfig)}:
            raise ConfigError(f"{name} must have one of json, regex, choice and grammar, got {value!r}")
        if not isinstance(given.get("choice", []), list):
            raise ConfigError(f"choice must be a list, got {given['choice']!r}")
        if "choice" in given:
            given["choice"] = tuple(given["choice"])
        return StructuredOutputConfig(**given)
    if isinstance(default, tuple):
        kind = str if name == "stop" else int
        if not isinstance(value, list) or not all(isinstance(item, kind) and not isinstance(item, bool) for item in value):
            raise ConfigError(f"{name} must be a list of {kind.__name__}, got {value!r}")
        return tuple(value)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise wrong
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong
    if isinstance(default, float):
        return float(value)
    if not float(value).is_integer():
        raise wrong
    return int(value)
