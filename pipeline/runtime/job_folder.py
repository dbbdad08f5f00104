"""The folder of one job, on any storage: whose it is, who works in it, and what in it may be thrown away.

What is deleted is what this program wrote, by name, and only where job.json is this program's. Knows nothing of what results
are.
"""

import contextlib
import json
import re
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sere.conf.errors import ConfigError
from sere.conf.masking import mask_uri, mask_values
from sere.conf.nested import describe_difference, digest_of
from sere.conf.whole_file import remove_unfinished
from sere.pipeline.runtime.lease import FileLock, ObjectLease, take_lease
from sere.pipeline.runtime.older_jobs import learnt_now, settings_then
from sere.pipeline.runtime.storage import Storage, first_line

JOB_FILE = "job.json"


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
    remedies: Mapping[str, str] = field(default_factory=dict)
    """By setting, what may help a job that differs in it, beside another output and `overwrite`."""


class JobFolder:
    """A job's folder. Use as a context manager: while it is open no other process can open it."""

    _lease: FileLock | ObjectLease

    def __init__(
        self,
        storage: Storage,
        kind: JobKind,
        settings: Mapping[str, Any],
        *,
        overwrite: bool,
        free: Collection[str] = (),
        earlier: Mapping[str, Collection[Any]] = MappingProxyType({}),
    ) -> None:
        """Nothing is read or written yet.

        Args:
            storage: Where it is.
            kind: What the job writes.
            settings: What determines the results, as JSON values. Another job's folder is refused.
            overwrite: Throw away what is there. Applies once: the same command, given again after an interruption, goes on.
            free: Keys of settings, begun with or asked for, in which the job may differ from what it was begun with.
            earlier: By setting, what a job begun by an earlier version may have in the place of today's value. Such a job
                goes on, and from then on has today's.
        """
        self.storage = storage
        self._kind, self._free = kind, frozenset(free)
        self._settings = json.loads(json.dumps(settings))
        self._overwrite = overwrite
        self._earlier = earlier
        self.token = uuid.uuid4().hex[:6]
        """Of this opening: in names that nobody else, at any time, may give."""
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
            self._lease = take_lease(self.storage)
            try:
                self._claim()
            except BaseException:
                self._lease.release()
                raise
        except ConfigError:
            raise
        except Exception as error:
            # Every kind of storage has errors of its own.
            raise ConfigError(
                f"cannot write into {self.storage.shown} ({mask_uri(first_line(error))}): choose another output"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self.storage.is_local:
            # A disk that cannot be written to is the error of whoever had something to write.
            with contextlib.suppress(OSError):
                for folder in ("", *self._kind.folders):
                    remove_unfinished(Path(self.storage.path, folder))
        self._lease.release()

    def check(self, *, now: bool = False) -> None:
        """Make sure that the folder is still this process's: every few seconds, and with `now` before throwing anything away.

        Raises:
            TryAgainError: if another process has taken over.
        """
        self._lease.check(now=now)

    def _claim(self) -> None:
        kind, before = self._kind, self._read_job()
        if before is None:
            self._refuse_other_files()
            self._note_job()
            return
        # What is learnt later is kept apart, as results carry the digest of the settings that the job was begun with.
        learnt = before.get("learnt", {})
        now = learnt_now({**before["settings"], **learnt}, self._settings, self._earlier)
        then = settings_then({**before["settings"], **learnt, **now}, self._settings, kind.absent)
        kept = {
            key: then[key] for key in kind.keeps - set(before["settings"]) if key in then and then[key] != self._settings[key]
        }
        is_same = self._counting(then) == self._counting({**self._settings, **kept})
        is_finished = self.storage.get(kind.finished) is not None
        # The command that overwrote, given again, goes on with what it began.
        overwrites = self._overwrite and not (is_same and before["overwrites"] and not is_finished)
        # A job that has no results yet (its engines never started, say) has nothing to lose.
        if before["clearing"] or overwrites or not (is_same or self._written(kind.results)):
            # From now on nothing counts that is still there, also if this is interrupted.
            self._note_job(clearing=True)
            self.storage.remove_all(
                [kind.finished, *kind.files, *(name for folder in kind.folders for name in self._written(folder))]
            )
            self._note_job()
        elif is_same:
            self.digest, self.kept = digest_of(before["settings"]), kept
            if now:
                self.storage.put_json(JOB_FILE, {"sere": kind.name, **before, "learnt": {**learnt, **now}})
        else:
            differing = [key for key in kind.remedies if then.get(key) != self._settings.get(key)]
            raise ConfigError(
                f"{self.storage.shown} holds another job "
                f"({describe_difference(self._counting(then), self._counting(self._settings))}): "
                f"{''.join(f'{kind.remedies[key]}, ' for key in differing)}choose another output, or set overwrite=true to "
                "throw it away"
            )

    def _counting(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings in which a job must not differ. A section that is empty says as much as one that is not there.

        Secrets are hidden as they are hidden today, also in what a job noted that was begun earlier.
        """
        return {key: mask_values(value, key) for key, value in settings.items() if key not in self._free and value != {}}

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
