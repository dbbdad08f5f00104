"""The folder of one job, on any storage: whose it is, who works in it, and what in it may be thrown away.

What is deleted is what this program wrote, by name, and only where job.json is this program's. Knows nothing of what results
are.
"""

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sere.conf.errors import ConfigError
from sere.conf.nested import describe_difference, digest_of
from sere.pipeline.runtime.older_jobs import settings_then
from sere.pipeline.runtime.storage import Storage

JOB_FILE = "job.json"
_HEARTBEAT_FILE = "driver.json"
_HEARTBEAT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class JobKind:
    """What a kind of job writes into its folder, beside `JOB_FILE` and who is at work."""

    name: str
    finished: str
    """The file that declares the job finished."""
    files: tuple[str, ...]
    """Further files."""
    results: str
    """The folder of the results."""
    folders: Mapping[str, str]
    """For each folder, `results` among them, a pattern of the files' names."""
    settings_of_0_1: frozenset[str]
    """Some settings of every such job of version 0.1, whose job.json holds settings only."""
    absent: Mapping[str, Any] = field(default_factory=dict)
    """What a setting counts as that a job begun earlier lacks, as it did not exist then: JSON values, dotted keys."""
    keeps: frozenset[str] = frozenset()
    """Those of them in which a job begun earlier stays as it was, whatever is asked for now."""


class JobFolder:
    """A job's folder. Use as a context manager: while it is open no other process can open it."""

    _beaten: float

    def __init__(self, storage: Storage, kind: JobKind, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        """Nothing is read or written yet.

        Args:
            storage: Where it is.
            kind: What the job writes.
            settings: What determines the results, as JSON values. Another job's folder is refused.
            overwrite: Throw away what is there. Applies once: the same command, given again after an interruption, goes on.
        """
        self.storage = storage
        self._kind = kind
        self._settings = json.loads(json.dumps(settings))
        self._overwrite = overwrite
        self._lock: Any = None
        self.digest = digest_of(self._settings)
        """Of the settings it was begun with: what results carry, to tell them from another job's. Known once it is open."""
        self.kept: dict[str, Any] = {}
        """Settings in which this job, begun before they existed, stays as it was, where others are asked for now."""

    def __enter__(self) -> "JobFolder":
        """Take the folder.

        Raises:
            ConfigError: if it cannot be written, another process works here, or it is not this job's.
        """
        try:
            self._take()
            try:
                self._claim()
            except BaseException:
                self.__exit__()
                raise
        except ConfigError:
            raise
        except Exception as error:
            # Every kind of storage has errors of its own.
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(f"cannot write into {self.storage.shown} ({reason}): choose another output") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            # The lock goes with the file, also when the process is killed.
            self._lock.close()
        else:
            self.storage.remove(_HEARTBEAT_FILE)

    def beat(self) -> None:
        """Say that this process is at work; to be called every few seconds."""
        if self._lock is None and time.monotonic() - self._beaten > _HEARTBEAT_S:
            self._beaten = time.monotonic()
            values = {"process": f"{socket.gethostname()}:{os.getpid()}", "time": time.time()}
            self.storage.put_json(_HEARTBEAT_FILE, values)

    def _take(self) -> None:
        busy = f"another process works in {self.storage.shown}: wait for it, or choose another output"
        if self.storage.is_local:
            os.makedirs(self.storage.path, exist_ok=True)
            self._lock = open(self.storage.locate("lock"), "w")  # noqa: SIM115
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                raise ConfigError(busy) from None
            return
        # No locks there: a process at work writes a new time every few seconds.
        before = self.storage.get(_HEARTBEAT_FILE)
        if before is not None:
            time.sleep(3 * _HEARTBEAT_S)
            if self.storage.get(_HEARTBEAT_FILE) != before:
                raise ConfigError(busy)
        self._beaten = 0.0
        self.beat()

    def _claim(self) -> None:
        kind, before = self._kind, self._read_job()
        if before is None:
            self._refuse_other_files()
            self._note_job()
            return
        then = settings_then(before["settings"], self._settings, kind.absent)
        kept = {
            key: then[key] for key in kind.keeps - set(before["settings"]) if key in then and then[key] != self._settings[key]
        }
        is_same = then == {**self._settings, **kept}
        is_finished = self.storage.get(kind.finished) is not None
        # The command that overwrote, given again, goes on with what it began.
        overwrites = self._overwrite and not (is_same and before["overwrites"] and not is_finished)
        # A job that has no results yet (its engines never started, say) has nothing to lose.
        if before["clearing"] or overwrites or not (is_same or self._written(kind.results)):
            # From now on nothing counts that is still there, also if this is interrupted.
            self._note_job(clearing=True)
            for name in [kind.finished, *kind.files, *(name for folder in kind.folders for name in self._written(folder))]:
                self.storage.remove(name)
            self._note_job()
        elif is_same:
            self.digest, self.kept = digest_of(before["settings"]), kept
        else:
            raise ConfigError(
                f"{self.storage.shown} holds another job ({describe_difference(then, self._settings)}): choose another output, "
                "or set overwrite=true to throw it away"
            )

    def _written(self, folder: str) -> list[str]:
        """The files in a folder that have a name that jobs of this kind give."""
        pattern = self._kind.folders[folder]
        return [name for name in self.storage.sizes(folder) if re.fullmatch(pattern, name.removeprefix(f"{folder}/"))]

    def _refuse_other_files(self) -> None:
        """Never mix with files of somebody else."""
        kind = self._kind
        found = [name for name in (kind.finished, *kind.files) if self.storage.get(name) is not None]
        found += self.storage.sizes(kind.results)
        found += [name for folder in kind.folders for name in self._written(folder)]
        if found:
            raise ConfigError(
                f"{self.storage.shown} has {found[0]}, which this program did not write (there is no {JOB_FILE}): choose "
                "another output, a new folder for example"
            )

    def _read_job(self) -> dict[str, Any] | None:
        """What the job file says; None if there is none.

        Raises:
            ConfigError: if it is not one of this program's, for this kind of job.
        """
        content = self.storage.get(JOB_FILE)
        if content is None:
            return None
        try:
            job = json.loads(content)
        except ValueError:
            job = None
        if isinstance(job, dict) and job.get("sere") == self._kind.name:
            return job
        if isinstance(job, dict) and set(job) >= self._kind.settings_of_0_1:
            return {"settings": job, "overwrites": False, "clearing": False}
        raise ConfigError(
            f"{self.storage.shown} has a {JOB_FILE} that `sere {self._kind.name}` did not write: choose another output"
        )

    def _note_job(self, *, clearing: bool = False) -> None:
        job = {"sere": self._kind.name, "settings": self._settings, "overwrites": self._overwrite, "clearing": clearing}
        self.storage.put_json(JOB_FILE, job)
