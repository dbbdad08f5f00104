"""The run directory of a generate job: whose it is, the parts that are finished, and which rows are in them.

Parts are the truth. A part is a parquet file that some replica wrote whole; each row in it names the file and row it answers,
so what is left to do is always the input less the rows in the parts. Two parts may hold the same row (a replica that was given
up wrote once more): the first part in order of names keeps it.
"""

import fcntl
import io
import json
import logging
import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sere.conf.errors import ConfigError
from sere.pipeline.runtime.storage import Storage

RESULTS = "results"
_PART = f"{RESULTS}/part-"
KEY = ["source_file", "source_row"]
"""Columns that say which input row a row answers."""
_JOB = "job.json"
DAMAGED = "damaged"
"""Folder of parts that are no parquet, kept to be looked at."""
_OWNER = b"sere.owner"
_FILES = ("manifest.json", "run.json", "errors.parquet", "summary.json", "similarity.safetensors")
_FOLDERS = {RESULTS: r"part-.+\.parquet", "sessions": r"\d+\.json", "logs": r"s\d+-r\d+\.log"}
"""Names of the files that a job writes, beside `_FILES`, job.json and the lock."""
_SETTINGS_0_1 = {"model_digest", "batch_size", "sampling.max_tokens"}
"""Some settings of every job of version 0.1, whose job.json holds nothing else."""
_log = logging.getLogger(__name__)
_HEARTBEAT_S = 5.0
# Object stores are slow to answer, and many requests at a time are not slower than one.
_THREADS = 16


@dataclass
class Finished:
    """The rows that are in the parts."""

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    """Per source file the finished positions, sorted."""
    num_rows: int = 0
    num_errors: int = 0
    generated_tokens: int = 0
    num_duplicates: int = 0
    """Rows that were in two parts, and are now in one."""


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    shown = "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in keys[:5])
    return shown + (f"; and {len(keys) - 5} more" if len(keys) > 5 else "")


class RunFolder:
    """A run directory. Use as a context manager: while it is open no other process can open it."""

    def __init__(self, storage: Storage, settings: dict[str, Any], *, digest: str, overwrite: bool) -> None:
        """Args:
        storage: Where it is.
        settings: What determines the results, as flat JSON values. Another job's folder is refused.
        digest: Of the settings; parts carry it.
        overwrite: Throw away what is there.
        """
        self.storage = storage
        self.digest = digest
        self._settings = settings
        self._overwrite = overwrite
        self._lock: Any = None

    def __enter__(self) -> "RunFolder":
        """Raises:
        ConfigError: if it cannot be written, another process works here, or it belongs to other settings.
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
            self.storage.remove("driver.json")

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
        before = self.storage.get("driver.json")
        if before is not None:
            time.sleep(3 * _HEARTBEAT_S)
            if self.storage.get("driver.json") != before:
                raise ConfigError(busy)
        self._beaten = 0.0
        self.beat()

    def beat(self) -> None:
        """Say that this process is at work; to be called every few seconds."""
        if self._lock is None and time.monotonic() - self._beaten > _HEARTBEAT_S:
            self._beaten = time.monotonic()
            self.storage.put_json("driver.json", {"process": f"{socket.gethostname()}:{os.getpid()}", "time": time.time()})

    def _claim(self) -> None:
        before = self._read_job()
        if before is None:
            # Never mix with files of somebody else.
            found = [name for name in _FILES if self.storage.get(name) is not None]
            found += [name for folder in (RESULTS, "sessions") for name in self.storage.sizes(folder)]
            if found:
                raise ConfigError(
                    f"{self.storage.shown} has {found[0]}, which this program did not write (there is no job.json): choose "
                    "another output, a new folder for example"
                )
            self._note_job()
            return
        is_same = before["settings"] == self._settings
        is_finished = self.storage.get(_FILES[0]) is not None
        has_results = bool(self.parts())
        # The command that overwrote, given again, goes on with what it began.
        overwrites = self._overwrite and not (is_same and before["overwrites"] and not is_finished)
        if before["clearing"] or overwrites or not (is_same or has_results):
            # From now on nothing counts that is still there, also if this is interrupted.
            self._note_job(clearing=True)
            self._clear()
            self._note_job()
        elif not is_same:
            raise ConfigError(
                f"{self.storage.shown} holds another job ({_difference(before['settings'], self._settings)}): choose another "
                "output, or set overwrite=true to throw it away"
            )

    def _read_job(self) -> dict[str, Any] | None:
        """What job.json says, or None if there is none.

        Raises:
            ConfigError: if it is not this program's.
        """
        content = self.storage.get(_JOB)
        if content is None:
            return None
        try:
            job = json.loads(content)
        except ValueError:
            job = None
        if isinstance(job, dict) and job.get("sere") == "generate":
            return job
        if isinstance(job, dict) and set(job) >= _SETTINGS_0_1:
            return {"settings": job, "overwrites": False, "clearing": False}
        raise ConfigError(f"{self.storage.shown} has a job.json that this program did not write: choose another output")

    def _note_job(self, *, clearing: bool = False) -> None:
        job = {"sere": "generate", "settings": self._settings, "overwrites": self._overwrite, "clearing": clearing}
        self.storage.put_json(_JOB, job)

    def _clear(self) -> None:
        """Remove what a job has written, and no other file."""
        names = list(_FILES)
        for folder, pattern in _FOLDERS.items():
            names += [name for name in self.storage.sizes(folder) if re.fullmatch(pattern, name.removeprefix(f"{folder}/"))]
        for name in names:
            self.storage.remove(name)

    def for_replicas(self) -> "RunFolder":
        """The same folder, not entered, to be sent to other processes."""
        return RunFolder(self.storage, {}, digest=self.digest, overwrite=False)

    def write_part(self, name: str, table: pa.Table) -> None:
        """Write `results/part-NAME.parquet`."""
        self.storage.put(f"{_PART}{name}.parquet", to_parquet(table, self.digest))

    def parts(self, prefix: str = "") -> list[str]:
        """The parts whose name begins so."""
        return [name for name in self.storage.sizes(RESULTS) if name.startswith(_PART + prefix)]

    def read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Rows of a part."""
        with self.storage.filesystem.open(self.storage.locate(name), "rb") as opened:
            return pq.read_table(opened, columns=columns)

    def read_all(self, names: list[str], columns: list[str] | None = None) -> Any:
        """Tables of several parts, in order, read ahead."""
        with ThreadPoolExecutor(_THREADS) as threads:
            for start in range(0, len(names), _THREADS):
                yield from threads.map(lambda name: self.read(name, columns), names[start : start + _THREADS])

    def scan(self) -> Finished:
        """Which rows are finished. Damaged parts are moved aside; rows of a second part are taken out of it.

        Raises:
            ConfigError: if a part belongs to another job, or cannot be read now.
        """
        num_duplicates = 0
        while True:
            sizes = {name: size for name, size in self.storage.sizes(RESULTS).items() if name.startswith(_PART)}
            with ThreadPoolExecutor(_THREADS) as threads:
                tables = dict(zip(sizes, threads.map(self._keys, sizes, sizes.values()), strict=True))
            for name in [name for name, table in tables.items() if table is None]:
                aside = f"{DAMAGED}/{name.rsplit('/', 1)[-1]}"
                _log.warning(
                    "%s is no parquet file: it is kept as %s, and its rows are done again", self.storage.locate(name), aside
                )
                self.storage.move(name, aside)
                del tables[name]
            finished, twice = _merge(tables)
            if not twice:
                finished.num_duplicates = num_duplicates
                return finished
            for name, rows in twice.items():
                num_duplicates += len(rows)
                self._take_out(name, rows)

    def _keys(self, name: str, size: int) -> pa.Table | None:
        """What a scan needs of a part; None if it is damaged."""
        columns = [*KEY, "error", "num_generated_tokens"]
        try:
            table = self.read(name, columns)
        except Exception:
            # A storage that fails and a damaged file look alike here: only all of its bytes tell.
            table = self._read_whole(name, size, columns)
        if table is None or not set(columns) <= set(table.column_names):
            return None
        if (table.schema.metadata or {}).get(_OWNER, b"").decode() != self.digest:
            raise ConfigError(f"{self.storage.shown}/{name} belongs to another job: move it away")
        return table

    def _read_whole(self, name: str, size: int, columns: list[str]) -> pa.Table | None:
        """A part from memory; None if its bytes are no parquet.

        Raises:
            ConfigError: if not all bytes could be read.
        """
        reason = "it is gone"
        try:
            content = self.storage.get(name)
            if content is not None and len(content) != size:
                reason, content = f"{len(content)} of {size} bytes were read", None
        except Exception as error:
            # Every kind of storage has errors of its own.
            reason, content = (str(error) or type(error).__name__).splitlines()[0], None
        if content is None:
            raise ConfigError(
                f"{self.storage.shown}/{name} cannot be read now ({reason}): nothing was changed, run the same command again "
                "when the storage answers"
            )
        try:
            return pq.read_table(io.BytesIO(content), columns=columns)
        except (pa.ArrowException, OSError, KeyError):
            return None

    def _take_out(self, name: str, rows: set[tuple[str, int]]) -> None:
        """Write a part again without some of its rows."""
        table = self.read(name)
        keys = zip(*(table[column].to_pylist() for column in KEY), strict=True)
        left = table.filter(pa.array([key not in rows for key in keys], pa.bool_()))
        if len(left):
            self.storage.put(name, to_parquet(left, self.digest))
        else:
            self.storage.remove(name)


def _merge(tables: dict[str, pa.Table]) -> tuple[Finished, dict[str, set[tuple[str, int]]]]:
    """What the parts hold together, and per part the rows that an earlier part holds too."""
    finished, twice = Finished(), {}
    if not tables:
        return finished, twice
    names, codes = list(tables), {}
    files, positions, owners = [], [], []
    for number, table in enumerate(tables.values()):
        encoded = table["source_file"].combine_chunks().dictionary_encode()
        local = np.array([codes.setdefault(value, len(codes)) for value in encoded.dictionary.to_pylist()], dtype=np.int64)
        files.append(local[encoded.indices.to_numpy()] if len(table) else local)
        positions.append(table["source_row"].to_numpy())
        owners.append(np.full(len(table), number))
        finished.num_rows += len(table)
        finished.num_errors += len(table) - table["error"].null_count
        finished.generated_tokens += pc.sum(table["num_generated_tokens"]).as_py() or 0
    file, position, owner = np.concatenate(files), np.concatenate(positions), np.concatenate(owners)
    # Stable: of equal rows, the one in the first part comes first.
    order = np.lexsort((position, file))
    file, position, owner = file[order], position[order], owner[order]
    again = np.zeros(len(order), dtype=bool)
    again[1:] = (file[1:] == file[:-1]) & (position[1:] == position[:-1])
    shown = list(codes)
    for index in np.flatnonzero(again):
        twice.setdefault(names[owner[index]], set()).add((shown[file[index]], int(position[index])))
    finished.rows = {name: position[file == code] for name, code in codes.items()}
    return finished, twice


def to_parquet(table: pa.Table, owner: str = "") -> bytes:
    """A table as the bytes of a parquet file that says whose it is."""
    metadata = {**(table.schema.metadata or {}), _OWNER: owner.encode()}
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), buffer, compression="zstd")
    return buffer.getvalue()
