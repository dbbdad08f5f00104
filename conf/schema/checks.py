"""Checks of single values that several schemas share."""

from typing import Any, get_args, get_type_hints

from sere.conf.errors import ConfigError


def at_least(config: Any, least: int, *names: str) -> None:
    """Refuse values below `least`."""
    for name in names:
        value = getattr(config, name)
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")


def one_of(config: Any, *names: str) -> None:
    """Refuse values that the field's `Literal` does not list."""
    hints = get_type_hints(type(config))
    for name in names:
        value, valid = getattr(config, name), get_args(hints[name])
        if value not in valid:
            raise ConfigError(f"{name} must be one of {', '.join(valid)}, got {value!r}")
