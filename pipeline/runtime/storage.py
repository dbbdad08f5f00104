"""Files at a local path or any fsspec URI, each of which appears whole or not at all. Knows nothing of what is in them."""

import json
import os
from pathlib import Path
from typing import Any

from sere.conf.errors import ConfigError
from sere.conf.masking import mask_uri
from sere.conf.whole_file import written_whole


def open_filesystem(uri: str, options: dict[str, Any]) -> tuple[Any, str]:
    """The fsspec file system behind a path or URI, and the path in it.

    Raises:
        ConfigError: if the protocol is unknown or its package is missing.
    """
    import fsspec

    protocol = uri.split("://", 1)[0] if "://" in uri else "file"
    try:
        filesystem, path = fsspec.core.url_to_fs(uri, **(options if protocol != "file" else {}))
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(f"{mask_uri(uri)} cannot be opened ({str(error).splitlines()[0]})") from error
    return filesystem, path


def first_line(error: Exception) -> str:
    """Of an error's text; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Storage:
    """A folder. Picklable: other nodes open it by its URI, with credentials from their own environment."""

    def __init__(self, uri: str, options: dict[str, Any] | None = None) -> None:
        """Open it; nothing is read yet.

        Raises:
            ConfigError: if there is no such kind of storage.
        """
        self._uri, self._options = (uri if "://" in uri else os.path.abspath(uri)), options or {}
        self._filesystem, path = open_filesystem(self._uri, self._options)
        self.path = path.rstrip("/")
        self.shown = mask_uri(uri)

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self._uri, self._options)

    @property
    def is_local(self) -> bool:
        return "file" in (self._filesystem.protocol if isinstance(self._filesystem.protocol, tuple) else ())

    @property
    def filesystem(self) -> Any:
        """The fsspec file system."""
        return self._filesystem

    def locate(self, name: str) -> str:
        """Where a file is, for `filesystem`.

        Raises:
            ValueError: if the name leads out of the folder.
        """
        parts = name.split("/")
        if name.startswith("/") or "\\" in name or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{name!r} leads out of {self.shown}")
        return f"{self.path}/{name}"

    def put(self, name: str, content: bytes) -> None:
        """Write a file whole: aside, then renamed; an object store shows an object only when it is complete."""
        place = self.locate(name)
        if not self.is_local:
            self._filesystem.pipe_file(place, content)
            return
        with written_whole(Path(place)) as aside:
            aside.write_bytes(content)

    def get(self, name: str) -> bytes | None:
        """A file's content; None if it is not there."""
        try:
            return self._filesystem.cat_file(self.locate(name))
        except FileNotFoundError:
            return None

    def put_json(self, name: str, values: Any) -> None:
        self.put(name, json.dumps(values, indent=1, sort_keys=True).encode())

    def get_json(self, name: str) -> Any:
        """The values in a JSON file; None if it is not there or is no JSON."""
        content = self.get(name)
        try:
            return None if content is None else json.loads(content)
        except ValueError:
            return None

    def sizes(self, folder: str) -> dict[str, int]:
        """The files in a folder below, without those being written, in order of their names, with their sizes in bytes."""
        place = self.locate(folder)
        self._filesystem.invalidate_cache(place)
        try:
            found = self._filesystem.ls(place, detail=True)
        except FileNotFoundError:
            return {}
        names = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in found if entry["type"] == "file"}
        return {f"{folder}/{name}": names[name] for name in sorted(names) if name and not name.startswith(".")}

    def set_aside(self, name: str) -> str:
        """Move a file that is damaged to where it can be looked at; returns its new name."""
        aside = f"damaged/{name.rsplit('/', 1)[-1]}"
        source, target = self.locate(name), self.locate(aside)
        self._filesystem.makedirs(os.path.dirname(target), exist_ok=True)
        self._filesystem.mv(source, target)
        self._filesystem.invalidate_cache()
        return aside

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it."""
        place = self.locate(name)
        self._filesystem.invalidate_cache(place)
        if self._filesystem.exists(place):
            self._filesystem.rm(place, recursive=True)
