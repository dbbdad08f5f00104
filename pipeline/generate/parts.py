"""The parts of a generate job's results, and which rows are in them.

Parts are the truth. A part is a parquet file that some replica wrote whole; each row in it names the file and row it answers,
so what is left to do is always the input less the rows in the parts. A row may be there twice (a replica that was given up
wrote once more; a row with an error was tried again): one without an error is kept, of several the one in the first part in
order of names. A part is damaged only if all of its bytes were read and are no parquet; then it is moved aside.
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

from sere.conf.errors import ConfigError, TryAgainError
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
    """Answers beside the one that was kept of their row."""


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
        """Rows of a part.

        Raises:
            FileNotFoundError: if it is gone.
            pyarrow.ArrowException, OSError: if it is damaged, or the storage does not answer.
        """
        try:
            with self.storage.filesystem.open(self.storage.locate(name), "rb") as opened:
                return pq.read_table(opened, columns=columns)
        except Exception:
            # Once more as a whole, which is tried again while a storage does not answer.
            content = self.storage.get(name)
            if content is None:
                raise
            return pq.read_table(io.BytesIO(content), columns=columns)

    def read_all(self, names: list[str], columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Tables of several parts, in order, read ahead."""
        with ThreadPoolExecutor(_THREADS) as threads:
            for start in range(0, len(names), _THREADS):
                yield from threads.map(lambda name: self.read(name, columns), names[start : start + _THREADS])

    def scan(self, *, errors_count: bool = True) -> Finished:
        """Which rows are finished. Damaged parts are moved aside; of several answers to a row all but one are taken out.

        Args:
            errors_count: Whether rows with an error are finished.

        Raises:
            ConfigError: if a part belongs to another job, or cannot be read now.
        """
        num_duplicates = 0
        while True:
            sizes = {name: size for name, size in self.storage.sizes(RESULTS).items() if name.startswith(_PART)}
            with ThreadPoolExecutor(_THREADS) as threads:
                found = dict(zip(sizes, threads.map(self._keys, sizes, sizes.values()), strict=True))
            tables = {name: table for name, table in found.items() if table is not None}
            for name in sorted(set(found) - set(tables)):
                aside = self.storage.set_aside(name)
                _log.warning(
                    "%s is no parquet file: it is kept as %s, and its rows are done again", self.storage.locate(name), aside
                )
            finished, twice = _merge(tables, errors_count=errors_count)
            if not twice:
                finished.num_duplicates = num_duplicates
                return finished
            for name, rows in twice.items():
                num_duplicates += len(rows)
                self._take_out(name, rows, len(tables[name]))

    def _keys(self, name: str, size: int) -> pa.Table | None:
        """What a scan needs of a part; None if it is damaged."""
        columns = [*KEY, "error", "num_generated_tokens"]
        try:
            with self.storage.filesystem.open(self.storage.locate(name), "rb") as opened:
                table = pq.read_table(opened, columns=columns)
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
            TryAgainError: if not all bytes could be read.
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
            raise TryAgainError(
                f"{self.storage.shown}/{name} cannot be read now ({reason}): nothing was changed, run the same command again "
                "when the storage answers"
            )
        try:
            return pq.read_table(io.BytesIO(content), columns=columns)
        except (pa.ArrowException, OSError, KeyError):
            return None

    def _take_out(self, name: str, rows: np.ndarray, num_rows: int) -> None:
        """Write a part again without some of its rows, given by number."""
        table = self.read(name)
        if len(table) != num_rows:
            # Somebody wrote it anew meanwhile: the next look at all parts tells.
            return
        keep = np.ones(num_rows, bool)
        keep[rows] = False
        if keep.any():
            self.storage.put(name, to_parquet(table.filter(pa.array(keep)), self.digest))
        else:
            self.storage.remove(name)


def _merge(tables: dict[str, pa.Table], *, errors_count: bool) -> tuple[Finished, dict[str, np.ndarray]]:
    """What the parts hold together, and per part the numbers of those of its rows that are not kept."""
    finished = Finished()
    if not tables:
        return finished, {}
    names = list(tables)
    codes: dict[str, int] = {}
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("file", "position", "error", "owner", "number")}
    for index, table in enumerate(tables.values()):
        encoded = table["source_file"].combine_chunks().dictionary_encode()
        local = np.array([codes.setdefault(value, len(codes)) for value in encoded.dictionary.to_pylist()], dtype=np.int64)
        columns["file"].append(local[encoded.indices.to_numpy()] if len(table) else local)
        columns["position"].append(table["source_row"].to_numpy())
        columns["error"].append(table["error"].is_valid().to_numpy())
        columns["owner"].append(np.full(len(table), index))
        columns["number"].append(np.arange(len(table)))
        finished.generated_tokens += pc.sum(table["num_generated_tokens"]).as_py() or 0
    file, position, error, owner, number = (np.concatenate(values) for values in columns.values())
    # The first of equal rows is kept.
    order = np.lexsort((number, owner, error, position, file))
    file, position, error = file[order], position[order], error[order]
    again = np.zeros(len(order), dtype=bool)
    again[1:] = (file[1:] == file[:-1]) & (position[1:] == position[:-1])
    losers = order[again]
    twice = {names[index]: number[losers[owner[losers] == index]] for index in np.unique(owner[losers])}
    counted = slice(None) if errors_count else ~error
    file, position, error = file[counted], position[counted], error[counted]
    finished.rows = {name: rows for name, code in codes.items() if len(rows := position[file == code])}
    finished.num_rows, finished.num_errors = len(position), int(error.sum())
    return finished, twice


def to_parquet(table: pa.Table, owner: str = "") -> bytes:
    """A table as the bytes of a parquet file that says whose it is."""
    metadata = {**(table.schema.metadata or {}), _OWNER: owner.encode()}
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), buffer, compression="zstd")
    return buffer.getvalue()
