"""Nested settings: as one flat mapping, as a digest, and the difference of two."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys. An empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def digest_of(values: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, whatever their order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def describe_difference(before: Mapping[str, Any], now: Mapping[str, Any], *, most: int = 5) -> str:
    """The keys that differ, with both values, on one line."""
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    shown = "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in keys[:most])
    return shown + (f"; and {len(keys) - most} more" if len(keys) > most else "")
