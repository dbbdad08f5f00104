"""Who works in a folder: one process at a time, on any storage.

On a file system that is a file lock, which goes with the process, however it ends. An object store has no locks. There the
process that creates the next file of `lease/`, which only one can, is at work, and says so in it every few seconds; a file
that does not change any more is a dead process's.
"""

import fcntl
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from typing import Any

from sere.conf.errors import TryAgainError
from sere.conf.masking import mask_uri
from sere.pipeline.runtime.storage import Storage, first_line

_LOCK = "lock"
_LEASE = "lease"
_NAMES = r"lease/\d{6}\.json"
HEARTBEAT_S = 5.0
# A process that is silent for so long is dead, or as good as dead.
_SILENCE_S = 3 * HEARTBEAT_S
_log = logging.getLogger(__name__)


def take_lease(storage: Storage) -> "FileLock | ObjectLease":
    """Become the only process at work in a folder.

    Raises:
        TryAgainError: if another one is.
        OSError: if the folder cannot be written to.
    """
    return FileLock(storage) if storage.is_local else ObjectLease(storage)


def _busy(storage: Storage, who: str = "another process") -> TryAgainError:
    return TryAgainError(f"{who} works in {storage.shown}: wait for it, or choose another output")


class FileLock:
    """A lock on a file in the folder."""

    def __init__(self, storage: Storage) -> None:
        """Take it; see `take_lease`."""
        os.makedirs(storage.path, exist_ok=True)
        # A link there would be somebody else's file; nor is anything ever written to this one.
        self._file: int | None = os.open(
            storage.locate(_LOCK), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644
        )
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise _busy(storage) from None

    def check(self, *, now: bool = False) -> None:
        """It cannot be lost."""

    def release(self) -> None:
        """Let others in."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class ObjectLease:
    """A file that this process has created and goes on writing, in a thread: also while the program is busy elsewhere."""

    def __init__(self, storage: Storage) -> None:
        """Take it, which takes 15 seconds where a process has died without releasing it; see `take_lease`."""
        self._storage = storage
        self._lost: str | None = None
        self._values: dict[str, Any] = {
            "process": f"{socket.gethostname()}:{os.getpid()}",
            "token": uuid.uuid4().hex,
            "beats": 0,
            "released": False,
        }
        before = self._newest()
        if before is not None:
            self._wait_for_silence(before)
        number = 1 if before is None else 1 + int(re.sub(r"\D", "", before))
        self._name = f"{_LEASE}/{number:06d}.json"
        if not storage.create(self._name, self._content()):
            raise _busy(storage)
        if before is not None:
            storage.remove(before)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def _content(self) -> bytes:
        return json.dumps(self._values).encode()

    def _newest(self) -> str | None:
        names = [name for name in self._storage.sizes(_LEASE) if re.fullmatch(_NAMES, name)]
        return names[-1] if names else None

    def _wait_for_silence(self, name: str) -> None:
        """Return when the process that has this lease has released it, or does not write any more.

        Raises:
            TryAgainError: if it is at work.
        """
        first, started = self._storage.get(name), time.monotonic()
        while True:
            try:
                values = json.loads(first or b"")
            except ValueError:
                values = {}
            if not isinstance(values, dict):
                values = {}
            if values.get("released") or first is None:
                return
            if time.monotonic() - started > _SILENCE_S:
                _log.warning(
                    "%s has been silent for %g s in %s: its work is taken over", values.get("process"), _SILENCE_S, name
                )
                return
            time.sleep(HEARTBEAT_S / 5)
            if self._storage.get(name) != first:
                raise _busy(self._storage, f"process {values.get('process')}")

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                self._look()
                if self._lost is not None:
                    return
                self._values["beats"] += 1
                self._storage.put(self._name, self._content())
            except Exception as error:
                # Others may take over meanwhile, which the next look shows.
                _log.warning("%s: no sign of life can be left (%s)", self._storage.shown, mask_uri(first_line(error)))

    def _look(self) -> None:
        """Note whether somebody else has taken over, as happens to a process that was stopped for a while."""
        newest = self._newest()
        if newest != self._name:
            self._lost = f"its lease {self._name} was taken over by {newest}"

    def check(self, *, now: bool = False) -> None:
        """To be called every now and then, and with `now` before anything is thrown away.

        Raises:
            TryAgainError: if another process has taken over.
        """
        if now and self._lost is None:
            self._look()
        if self._lost is not None:
            raise TryAgainError(
                f"this process was silent for {_SILENCE_S:g} s, and another one goes on with {self._storage.shown} "
                f"({self._lost}): nothing is lost, leave it to that one"
            )

    def release(self) -> None:
        """Let others in at once."""
        self._stop.set()
        self._thread.join()
        try:
            self._look()
            if self._lost is None:
                self._values["released"] = True
                self._storage.put(self._name, self._content())
        except Exception as error:
            # It ends anyway, by silence.
            _log.warning("%s could not be released (%s)", self._name, mask_uri(first_line(error)))
