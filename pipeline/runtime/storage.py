"""Files at a local path or any fsspec URI, each of which appears whole or not at all. Knows nothing of what is in them.

Whatever fails and may pass is tried again (`sere.pipeline.runtime.retries`).
"""

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sere.conf.errors import ConfigError
from sere.conf.masking import mask_uri
from sere.conf.whole_file import written_whole
from sere.pipeline.runtime.retries import PATIENCE_S, patiently

_Result = TypeVar("_Result")
# Object stores take so many in one request.
_MOST_DELETED = 1000


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

    def __init__(self, uri: str, options: dict[str, Any] | None = None, *, patience_s: float = PATIENCE_S) -> None:
        """Open it; nothing is read yet.

        Args:
            uri: A path, or a URI of a file system that fsspec knows.
            options: Of the file system.
            patience_s: Seconds for which a call that fails is tried again.

        Raises:
            ConfigError: if there is no such kind of storage.
        """
        self._uri, self._options = (uri if "://" in uri else os.path.abspath(uri)), options or {}
        self._patience_s = patience_s
        self._filesystem, path = open_filesystem(self._uri, self._options)
        self.path = path.rstrip("/")
        self.shown = mask_uri(uri)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self._uri, self._options, self._patience_s)

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

    def _patiently(self, name: str, call: Callable[[], _Result]) -> _Result:
        return patiently(call, what=f"{self.shown}/{name}", patience_s=self._patience_s)

    def put(self, name: str, content: bytes) -> None:
        """Write a file whole: aside, then renamed; an object store shows an object only when it is complete."""
        place = self.locate(name)

        def write() -> None:
            if not self.is_local:
                self._filesystem.pipe_file(place, content)
                return
            with written_whole(Path(place)) as aside:
                aside.write_bytes(content)

        self._patiently(name, write)

    def create(self, name: str, content: bytes) -> bool:
        """Write a file that is not there yet; False if it is. Of several who try at once one succeeds.

        Args:
            name: Of the file.
            content: Unlike anybody else's: where an answer is lost it tells who wrote the file.
        """
        place = self.locate(name)

        def write() -> bool:
            try:
                if self.is_local:
                    os.makedirs(os.path.dirname(place), exist_ok=True)
                    with open(place, "xb") as opened:
                        opened.write(content)
                else:
                    self._filesystem.pipe_file(place, content, mode="create")
            except Exception:
                # Stores say "exists" in ways of their own, and so they do of a file that the call before this one wrote.
                if self.get(name) is None:
                    raise
            # Also where a store knows no conditions, and has written over what was there.
            return self.get(name) == content

        return self._patiently(name, write)

    def get(self, name: str) -> bytes | None:
        """A file's content; None if it is not there."""
        place = self.locate(name)

        def read() -> bytes | None:
            try:
                return self._filesystem.cat_file(place)
            except FileNotFoundError:
                return None

        return self._patiently(name, read)

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

        def read() -> list[dict[str, Any]]:
            self._filesystem.invalidate_cache(place)
            try:
                return self._filesystem.ls(place, detail=True)
            except FileNotFoundError:
                return []

        found = self._patiently(folder, read)
        names = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in found if entry["type"] == "file"}
        return {f"{folder}/{name}": names[name] for name in sorted(names) if name and not name.startswith(".")}

    def set_aside(self, name: str) -> str:
        """Move a file that is damaged to where it can be looked at; returns its new name, which nothing had before."""
        aside = f"damaged/{name.rsplit('/', 1)[-1]}"
        source, target = self.locate(name), self.locate(aside)

        def move() -> str:
            found = target
            if self._filesystem.exists(target):
                found = f"{target}.{uuid.uuid4().hex[:8]}"
            self._filesystem.makedirs(os.path.dirname(found), exist_ok=True)
            self._filesystem.mv(source, found)
            self._filesystem.invalidate_cache()
            return found

        return self._patiently(name, move).removeprefix(f"{self.path}/")

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        self.remove_all([name])

    def remove_all(self, names: Iterable[str]) -> None:
        """Remove files, many in one request where the storage can. What is not there is no error."""
        places = [self.locate(name) for name in names]

        def remove(some: list[str]) -> None:
            if not self.is_local and len(some) > 1:
                with contextlib.suppress(FileNotFoundError):
                    self._filesystem.rm(some)
                    return
            for place in some:
                with contextlib.suppress(FileNotFoundError):
                    self._filesystem.rm_file(place)

        for start in range(0, len(places), _MOST_DELETED):
            some = places[start : start + _MOST_DELETED]
            self._patiently(f"{len(some)} files", partial(remove, some))
        if places:
            self._filesystem.invalidate_cache()


def _reopened(uri: str, options: dict[str, Any], patience_s: float) -> Storage:
    return Storage(uri, options, patience_s=patience_s)
