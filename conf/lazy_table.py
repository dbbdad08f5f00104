"""A read-only table of classes by name that imports a class when it is asked for."""

import importlib
from collections.abc import Iterator, Mapping
from typing import TypeVar

from sere.conf.errors import ConfigError

Entry = TypeVar("Entry")


class LazyTable(Mapping[str, Entry]):
    """Classes by name; listing the names imports nothing."""

    def __init__(self, what: str, places: Mapping[str, str]) -> None:
        """Nothing is imported yet.

        Args:
            what: What the names are of, for the error of an unknown one.
            places: `MODULE:CLASS` by name.
        """
        self._what, self._places = what, dict(places)

    def __getitem__(self, name: str) -> Entry:
        """The class of a name.

        Raises:
            ConfigError: if there is no such name.
        """
        if name not in self._places:
            raise ConfigError(f"unknown {self._what} {name!r}: valid are {', '.join(self._places)}")
        module, _, attribute = self._places[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
