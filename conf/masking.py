"""Hides secrets in what is shown or recorded."""

import re
from typing import Any

_HIDDEN = "***"
# What storage is opened with. Each of fsspec's file systems has its own names for what is secret.
_OPTIONS = "storage_options"
# Anywhere in a name; and words at its end: `pat`, but neither `path` nor `compat`.
_SECRET = re.compile(
    r"secret|passw|passphrase|credential|authorization|cookie|connection[_-]?str|(api|account|access|private)[_-]?key"
    r"|(^|[^a-z0-9])(token|key|sas|pat|pwd|pw|pass|auth|jwt|bearer|dsn|signature)$"
    r"|(?-i:[a-z0-9](Token|Key|Sas|Pat|Pwd|Auth)$)",
    re.IGNORECASE,
)
# A place in the registry is no URI: its @ comes before an alias.
_START = re.compile(r"(?<![a-z0-9+.-])(?:[a-z][a-z0-9+.-]*://|models:/(?!/))", re.IGNORECASE)
# Of Azure's connection strings, and of HTTP headers.
_PAIRS = re.compile(r"\b(AccountKey|SharedAccessKey|SharedAccessSignature|bearer)(\s*=\s*|\s+)[^;\s'\"]+", re.IGNORECASE)


def mask_uri(text: str) -> str:
    """The text with no user, password, query or fragment in the URIs that are in it: a query may hold a signature.

    A password may have any sign in it, also those that end a URI elsewhere: what may be one is hidden up to the last @ of the
    line, or before the next URI, even if that is too much.
    """
    starts = list(_START.finditer(text))
    ends = [*(match.start() for match in starts[1:]), len(text)]
    found = text[: starts[0].start()] if starts else text
    for match, end in zip(starts, ends, strict=False):
        rest = text[match.end() : end]
        found += match.group() + (_mask_one(rest) if match.group().endswith("://") else rest)
    return _PAIRS.sub(rf"\1\2{_HIDDEN}", found)


def _mask_one(rest: str) -> str:
    """What follows the :// of one URI, up to the next one."""
    line, newline, after = rest.partition("\n")
    line = re.sub(r"^(?:[^/\s@'\"]*:.*|[^/\s@'\"]*)@", f"{_HIDDEN}@", line)
    line = re.sub(r"^([^\s?#'\"]*)([?#])[^\s'\"]*", rf"\1\2{_HIDDEN}", line)
    return line + newline + after


def mask_values(values: Any, key: str = "") -> Any:
    """Nested values with URIs masked, and what stands under a key that names a secret, or below `storage_options`."""
    if isinstance(values, dict):
        if key == _OPTIONS:
            return dict.fromkeys(values, _HIDDEN)
        return {name: mask_values(value, str(name)) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [mask_values(value, key) for value in values]
    if values in (None, "") or isinstance(values, bool):
        return values
    if _SECRET.search(key):
        return _HIDDEN
    return mask_uri(values) if isinstance(values, str) else values
