"""What is generated for a prompt; names and meanings are vLLM's."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from sere.conf.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputConfig:
    """What every answer must look like; exactly one of these. Names are vLLM's `StructuredOutputsParams`."""

    json: Any = None
    """A JSON schema, as a mapping or as text."""
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    """In EBNF."""

    def __post_init__(self) -> None:
        if sum(getattr(self, field.name) is not None for field in dataclasses.fields(self)) != 1:
            raise ConfigError("structured_output needs exactly one of json, regex, choice and grammar")

    def to_dict(self) -> dict[str, Any]:
        """The one constraint that is set, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if name == "choice" else value for name, value in values.items() if value is not None}


# What vLLM can send to its engine.
_INTEGERS = (
    ("max_tokens", 1, 2**31 - 1),
    ("min_tokens", 0, 2**31 - 1),
    ("top_k", 0, 2**31 - 1),
    ("stop_token_ids", 0, 2**31 - 1),
    ("seed", -(2**63), 2**63 - 1),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """What is generated for a prompt. Names and meanings are vLLM's `SamplingParams`."""

    max_tokens: int = 256
    """Most tokens generated for a prompt."""
    min_tokens: int = 0
    temperature: float = 0.0
    """0: the most likely token every time."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    """Seed of each row's draws; null: the engine's."""
    structured_output: StructuredOutputConfig | None = None
    """What every answer must look like: {json: SCHEMA}, {regex: ...}, {choice: [...]} or {grammar: ...}; null: anything."""

    def __post_init__(self) -> None:
        for name, least, most in _INTEGERS:
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                if one is not None and not least <= one <= most:
                    raise ConfigError(f"{name} must be between {least} and {most}, got {str(one)[:30]}")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be between 0 and 1, got {self.min_p}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ConfigError(f"{name} must be between -2 and 2, got {getattr(self, name)}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if self.min_tokens > self.max_tokens:
            raise ConfigError(f"min_tokens ({self.min_tokens}) must not be above max_tokens ({self.max_tokens})")
