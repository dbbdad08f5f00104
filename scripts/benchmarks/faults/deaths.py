"""Kill -9 at one storage operation exactly: before it, in its midst, or after it. Armed inside the process that writes."""

import contextlib
import functools
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere.pipeline.runtime.storage import Storage

MOMENTS = ("before", "midst", "after")


@dataclass(frozen=True)
class Death:
    """Which operation, and who dies."""

    operations: str
    """Pattern of the operations that are counted, as in `put results/part-ordered-`; `put`, `create` and `remove`."""
    number: int
    """Of the operation among those, from 0."""
    moment: str
    """One of `MOMENTS`."""
    victims: tuple[int, ...] = ()
    """Processes to kill; empty: the one that writes."""
    share: float = 0.5
    """Of the bytes written, or of the files removed, in the midst."""

    def kill(self) -> None:
        for pid in self.victims or (os.getpid(),):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def arm(death: Death | None, log: Path | None = None) -> None:
    """Strike in this process when the time has come.

    Args:
        death: When; None: never.
        log: Gets a line per operation that changes a storage.
    """
    count = iter(range(10**9))

    def is_now(operation: str) -> bool:
        if log is not None:
            with log.open("a") as opened:
                opened.write(f"{operation}\n")
        return death is not None and bool(re.match(death.operations, operation)) and next(count) == death.number

    for name, word, partly in (
        ("put", "put", _partly_written),
        ("create", "create", None),
        ("remove_all", "remove", _partly_removed),
    ):
        setattr(Storage, name, _struck(getattr(Storage, name), word, is_now, death, partly))


def _struck(
    method: Callable, word: str, is_now: Callable[[str], bool], death: Death | None, partly: Callable | None
) -> Callable:
    @functools.wraps(method)
    def run(storage: Storage, names: Any, *rest: Any) -> Any:
        names = names if isinstance(names, str) else list(names)
        first = names if isinstance(names, str) else next(iter(names), "nothing")
        if not is_now(f"{word} {first}") or death is None:
            return method(storage, names, *rest)
        if death.moment == "before":
            death.kill()
        elif death.moment == "midst" and partly is not None and partly(method, storage, death, names, *rest):
            return None
        done = method(storage, names, *rest)
        death.kill()
        return done

    return run


def _partly_written(method: Callable, storage: Storage, death: Death, name: str, content: bytes) -> bool:
    """Die when some of the bytes are in the file that would take the name. False on an object store, which has no such file."""
    if not storage.is_local:
        return False
    write_bytes = Path.write_bytes

    def write_partly(file: Path, data: bytes) -> int:
        if not file.name.startswith(f".{name.rsplit('/', 1)[-1]}."):
            return write_bytes(file, data)
        write_bytes(file, data[: int(len(data) * death.share)])
        death.kill()
        # It was somebody else's death, and this process has a moment left.
        time.sleep(0.3)
        return write_bytes(file, data)

    Path.write_bytes = write_partly
    try:
        method(storage, name, content)
    finally:
        Path.write_bytes = write_bytes
    return True


def _partly_removed(method: Callable, storage: Storage, death: Death, names: list[str]) -> bool:
    method(storage, names[: int(len(names) * death.share)])
    death.kill()
    return False
