"""The errors that users see, and the one for a key that does not exist."""

import difflib


class ConfigError(ValueError):
    """A setting or an input that the user has to change. The message names the value and the remedy, in one line."""


class TryAgainError(ConfigError):
    """What the same command may get past when it is run again: nothing has to be changed. Exit status 75, not 2."""


def unknown_key(key: str, valid: list[str], where: str) -> ConfigError:
    """The error for a key that does not exist, with the nearest one that does."""
    close = difflib.get_close_matches(key.rsplit(".", 1)[-1], valid, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"valid keys: {', '.join(sorted(valid))}"
    return ConfigError(f"unknown key {key!r} in {where}: {hint}")
