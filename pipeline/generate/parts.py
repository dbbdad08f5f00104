"""The parts of a generate job's results, and which rows are in them.

Parts are the truth. A part is a parquet file that some replica wrote whole; each row in it names the file and row it answers,
so what is left to do is always the input less the rows in the parts. A row may be there twice (a replica that was given up
wrote once more; a row with an error was tried again): one without an error is kept, of several the one in the first part in
order of names. A part is damaged only if all of its bytes were read and are no parquet; then it is moved aside.
"""

import io
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sere.conf.errors import ConfigError, TryAgainError
from sere.pipeline.data.source import PLACE
from sere.pipeline.evaluate.scorers import SCORED
from sere.pipeline.runtime.retries import patiently
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


@dataclass(frozen=True)
class PartFacts:
    """What is known of a part without reading its rows."""

    size: int
    """Bytes."""
    num_rows: int
    num_errors: int
    reference: str
    """Column that its rows were scored against; "" where they were not."""


@dataclass
class Finished:
    """The rows that are in the parts; `Parts.scan` fills it."""

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    """Per source file the finished positions, sorted."""
    num_rows: int = 0
    num_errors: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    num_duplicates: int = 0
    """Answers beside the one that was kept of their row."""
    parts: dict[str, PartFacts] = field(default_factory=dict)
    """By name, in order."""


@dataclass(frozen=True)
class _Keys:
    """What a scan keeps of a part."""

    facts: PartFacts
    places: dict[str, np.ndarray]
    """Per source file the positions, in the order of the rows."""
    numbers: dict[str, np.ndarray]
    """Numbers of the rows of those."""
    error: np.ndarray
    """Whether a row has one."""
    prompt_tokens: int
    generated_tokens: int


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

    def write(self, name: str, table: pa.Table) -> tuple[str, int]:
        """Write `results/part-NAME.parquet`; returns that, and its size in bytes."""
        return self.write_all(name, [table])

    def write_all(self, name: str, tables: Iterable[pa.Table]) -> tuple[str, int]:
        """The same of several tables, see `to_parquet`."""
        whole, content = f"{_PART}{name}.parquet", to_parquet(tables, self.digest)
        self.storage.put(whole, content)
        return whole, len(content)

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
            with self.storage.filesystem.open(self.storage.locate(name), "rb", cache_type="none") as opened:
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

    def count(self, names: Iterable[str]) -> int:
        """Rows of several parts, by what the storage holds of them."""

        def rows(name: str) -> int:
            with self.storage.filesystem.open(self.storage.locate(name), "rb", cache_type="none") as opened:
                return pq.read_metadata(opened).num_rows

        # A new look: other processes have written them.
        wanted = set(names)
        there = [name for name in self.storage.sizes(RESULTS) if name in wanted]
        with ThreadPoolExecutor(_THREADS) as threads:
            return sum(threads.map(lambda name: patiently(lambda: rows(name), what=f"{self.storage.shown}/{name}"), there))

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
                looked = dict(zip(sizes, threads.map(self._keys, sizes, sizes.values()), strict=True))
            found = {name: keys for name, keys in looked.items() if keys is not None}
            for name in sorted(set(looked) - set(found)):
                aside = self.storage.set_aside(name)
                _log.warning(
                    "%s is no parquet file: it is kept as %s, and its rows are done again", self.storage.locate(name), aside
                )
            finished, twice = _merge(found, errors_count=errors_count)
            if not twice:
                finished.num_duplicates = num_duplicates
                return finished
            for name, rows in twice.items():
                num_duplicates += len(rows)
                self._take_out(name, rows, found[name].facts.num_rows)

    def _keys(self, name: str, size: int) -> _Keys | None:
        """What a scan needs of a part; None if it is damaged."""
        columns = [*KEY, "error", "num_prompt_tokens", "num_generated_tokens"]
        try:
            # The few bytes that these columns are, in few requests.
            with self.storage.filesystem.open(self.storage.locate(name), "rb", cache_type="none") as opened:
                table = pq.read_table(opened, columns=columns, read_dictionary=["source_file"], pre_buffer=True)
        except Exception:
            # A storage that fails and a damaged file look alike here: only all of its bytes tell.
            table = self._read_whole(name, size, columns)
        if table is None or not set(columns) <= set(table.column_names):
            return None
        metadata = table.schema.metadata or {}
        if metadata.get(_OWNER, b"").decode() != self.digest:
            raise ConfigError(f"{self.storage.shown}/{name} belongs to another job: move it away")
        error = table["error"].is_valid().to_numpy()
        return _Keys(
            PartFacts(size, len(table), int(error.sum()), metadata.get(SCORED, b"").decode()),
            *_by_file(table),
            error,
            *(pc.sum(table[column]).as_py() or 0 for column in columns[-2:]),
        )

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
            return pq.read_table(io.BytesIO(content), columns=columns, read_dictionary=["source_file"])
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
            self.storage.put(name, to_parquet([table.filter(pa.array(keep))], self.digest))
        else:
            self.storage.remove(name)


def _by_file(table: pa.Table) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Positions of a part's rows, and their numbers in it, by source file."""
    files, positions = table["source_file"].unify_dictionaries().combine_chunks(), table["source_row"].to_numpy()
    if not len(table):
        return {}, {}
    codes = files.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    present, starts = np.unique(codes[order], return_index=True)
    names = files.dictionary.take(pa.array(present)).to_pylist()
    groups = np.split(order, starts[1:])
    return {name: positions[group] for name, group in zip(names, groups, strict=True)}, dict(zip(names, groups, strict=True))


def _merge(parts: dict[str, _Keys], *, errors_count: bool) -> tuple[Finished, dict[str, np.ndarray]]:
    """What the parts hold together, and per part the numbers of those of its rows that are not kept."""
    finished = Finished(parts={name: keys.facts for name, keys in parts.items()})
    places: dict[str, list[np.ndarray]] = {}
    for keys in parts.values():
        for file, positions in keys.places.items():
            places.setdefault(file, []).append(positions)
    finished.rows = {file: np.sort(np.concatenate(positions)) for file, positions in places.items()}
    again = {file: rows[1:][rows[1:] == rows[:-1]] for file, rows in finished.rows.items()}
    if again := {file: rows for file, rows in again.items() if len(rows)}:
        return finished, _not_kept(parts, again)
    finished.num_errors = sum(keys.facts.num_errors for keys in parts.values()) if errors_count else 0
    finished.prompt_tokens = sum(keys.prompt_tokens for keys in parts.values())
    finished.generated_tokens = sum(keys.generated_tokens for keys in parts.values())
    if not errors_count:
        for keys in parts.values():
            for file, positions in keys.places.items() if keys.facts.num_errors else ():
                failed = positions[keys.error[keys.numbers[file]]]
                finished.rows[file] = np.setdiff1d(finished.rows[file], failed, assume_unique=True)
    finished.num_rows = sum(len(rows) for rows in finished.rows.values())
    return finished, {}


def _not_kept(parts: dict[str, _Keys], again: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of rows that are there more than once all but one, by part and number."""
    codes = {file: code for code, file in enumerate(again)}
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("file", "position", "error", "owner", "number")}
    for owner, keys in enumerate(parts.values()):
        for file in codes.keys() & keys.places.keys():
            are = np.isin(keys.places[file], again[file])
            numbers = keys.numbers[file][are]
            columns["file"].append(np.full(len(numbers), codes[file]))
            columns["position"].append(keys.places[file][are])
            columns["error"].append(keys.error[numbers])
            columns["owner"].append(np.full(len(numbers), owner))
            columns["number"].append(numbers)
    file, position, error, owner, number = (np.concatenate(values) for values in columns.values())
    # The first of equal rows is kept.
    order = np.lexsort((number, owner, error, position, file))
    is_same = (file[order][1:] == file[order][:-1]) & (position[order][1:] == position[order][:-1])
    losers = order[1:][is_same]
    names = list(parts)
    return {names[index]: number[losers[owner[losers] == index]] for index in np.unique(owner[losers]).tolist()}


def to_parquet(tables: Iterable[pa.Table], owner: str = "") -> bytes:
    """Tables of one schema, at least one, as the bytes of a parquet file that says whose it is; each is a row group."""
    content, writer = io.BytesIO(), None
    for table in tables:
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _OWNER: owner.encode()})
        writer = writer or pq.ParquetWriter(content, table.schema, compression="zstd")
        writer.write_table(table)
    assert writer is not None
    writer.close()
    return content.getvalue()
