"""Hides secrets in what is shown or recorded."""

import re
from typing import Any

_SECRET = re.compile(r"secret|passw|credential|(^|_)(token|key|sas)$|api_?key", re.IGNORECASE)


def mask_uri(text: str) -> str:
    """The text with no user, password or query in the URIs that are in it: a query may hold a signature."""
    text = re.sub(r"(?<=://)[^/\s@'\"]*@", "***@", text)
    return re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]*", r"\1?***", text)


def mask_values(values: Any, key: str = "") -> Any:
    """Nested values with URIs masked, and what stands under a key that names a secret."""
    if isinstance(values, dict):
        return {name: mask_values(value, str(name)) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [mask_values(value, key) for value in values]
    if isinstance(values, str):
        return "***" if values and _SECRET.search(key) else mask_uri(values)
    return values
