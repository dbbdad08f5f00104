"""The parts of a generate job's results, and which rows are in them.

Parts are the truth. A part is a parquet file that some replica wrote whole; each row in it names the file and row it answers,
so what is left to do is always the input less the rows in the parts. Two parts may hold the same row (a replica that was given
up wrote once more): the first part in order of names keeps it. A part is damaged only if all of its bytes were read and are no
parquet; then it is moved aside.
"""

import io
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sere.conf.errors import ConfigError
from sere.pipeline.data.source import PLACE
from sere.pipeline.runtime.storage import Storage

RESULTS = "results"
PART_NAMES = r"part-.+\.parquet"
"""Pattern of the names in `RESULTS`."""
_PART = f"{RESULTS}/part-"
KEY = PLACE.names
"""Columns that say which input row a row answers."""
_OWNER = b"sere.owner"
# Object stores are slow to answer, and many requests at a time are not slower than one.
_THREADS = 16
_log = logging.getLogger(__name__)


@dataclass
class Finished:
    """The rows that are in the parts; `Parts.scan` fills it."""

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    """Per source file the finished positions, sorted."""
    num_rows: int = 0
    num_errors: int = 0
    generated_tokens: int = 0
    num_duplicates: int = 0
    """Rows that were in two parts, and are now in one."""


class Parts:
    """The parts in a job's folder. Picklable: replicas write them from other nodes."""

    def __init__(self, storage: Storage, digest: str) -> None:
        """Nothing is read or written yet.

        Args:
            storage: The job's folder.
            digest: Of the job's settings; parts carry it, and those of another job are refused.
        """
        self.storage = storage
        self.digest = digest

    def write(self, name: str, table: pa.Table) -> None:
        """Write `results/part-NAME.parquet`."""
        self.storage.put(f"{_PART}{name}.parquet", to_parquet(table, self.digest))

    def names(self, prefix: str = "") -> list[str]:
        """The parts whose name begins so."""
        return [name for name in self.storage.sizes(RESULTS) if name.startswith(_PART + prefix)]

    def read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Rows of a part."""
        with self.storage.filesystem.open(self.storage.locate(name), "rb") as opened:
            return pq.read_table(opened, columns=columns)

    def read_all(self, names: list[str], columns: list[str] | None = None) -> Iterator[pa.Table]:
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
                aside = self.storage.set_aside(name)
                _log.warning(
                    "%s is no parquet file: it is kept as %s, and its rows are done again", self.storage.locate(name), aside
                )
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
    finished = Finished()
    twice: dict[str, set[tuple[str, int]]] = {}
    if not tables:
        return finished, twice
    names = list(tables)
    codes: dict[str, int] = {}
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
