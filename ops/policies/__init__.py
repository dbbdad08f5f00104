"""Routing policies: what happens to the experts a router selected. One file per family, chosen by name from `POLICIES`."""

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from sere.conf.errors import ConfigError

if TYPE_CHECKING:
    from sere.ops.policies.base import Policy

_CLASSES = {
    "none": "sere.ops.policies.none:NonePolicy",
    "sere": "sere.ops.policies.sere:SerePolicy",
    "top_k": "sere.ops.policies.top_k:TopKPolicy",
    "random": "sere.ops.policies.random:RandomPolicy",
}


class _Policies(Mapping[str, "type[Policy]"]):
    """Policy classes by name, imported when asked for. Read-only; an unknown name is a ConfigError."""

    def __getitem__(self, name: str) -> "type[Policy]":
        if name not in _CLASSES:
            raise ConfigError(f"unknown policy {name!r}: valid are {', '.join(_CLASSES)}")
        module, _, attribute = _CLASSES[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return name in _CLASSES

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


POLICIES: Mapping[str, "type[Policy]"] = _Policies()
