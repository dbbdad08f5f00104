"""The last form of a job's parts: files worth opening, scored against the references, in the input's order if asked.

Ray tasks do it: no row passes through the driver. New parts are written beside the old ones, and counted.
"""

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sere.conf.errors import ConfigError, TryAgainError
from sere.conf.schema import GenerateConfig
from sere.pipeline.data.source import FILE_NUMBER, Source
from sere.pipeline.evaluate.scorers import with_scores
from sere.pipeline.generate.dispatch.work import Rows, cut, joined, reason
from sere.pipeline.generate.parts import Finished, PartFacts, Parts
from sere.pipeline.runtime.job_folder import JobFolder

# Of rows in memory.
_ROW_GROUP_BYTES = 64 * 2**20
# At a time; each holds a part in memory.
_MOST_TASKS = 32


def arrange(
    config: GenerateConfig,
    source: Source,
    folder: JobFolder,
    parts: Parts,
    finished: Finished,
    *,
    references: str,
    is_ordered: bool,
) -> dict[str, PartFacts]:
    """Write again what is not as it should be; returns the parts that are the result then. Nothing is removed.

    Args:
        config: Of the job.
        source: Its input.
        folder: Its folder.
        parts: Its results.
        finished: What is in them.
        references: The column that rows are scored against; "": none.
        is_ordered: They are in the input's order, by their names.

    Raises:
        TryAgainError: if it is not as many rows that were written.
    """
    target = config.part_mib * 2**20
    if config.preserve_order and not is_ordered:
        again = list(finished.parts)
        written = _in_order(source, folder, parts, finished, references=references, target=target)
    else:
        groups = _groups(finished.parts, references, target, in_order=is_ordered)
        again = [name for group in groups for name in group]
        prefix = f"{'ordered' if is_ordered else 'compact'}-{folder.token}-"
        calls = ((_rewrite, parts, f"{prefix}{number:06d}", references, group) for number, group in enumerate(groups))
        written = dict(pair for some in run_tasks(calls, folder) for pair in some)
    wanted, counted = sum(finished.parts[name].num_rows for name in again), parts.count(written)
    if not wanted == counted == sum(facts.num_rows for facts in written.values()):
        raise TryAgainError(
            f"{parts.storage.shown}: of {wanted} rows to be written once more {counted} are there. Nothing was removed: run "
            "the same command again"
        )
    kept = {name: facts for name, facts in finished.parts.items() if name not in again}
    return dict(sorted({**kept, **written}.items()))


def failed_rows(parts: Parts, arranged: Mapping[str, PartFacts], folder: JobFolder) -> Iterator[pa.Table]:
    """The results that have an error, a table per part."""
    yield from run_tasks(((_failed, parts, name) for name, facts in arranged.items() if facts.num_errors), folder)


def run_tasks(calls: Iterable[tuple[Any, ...]], folder: JobFolder) -> Iterator[Any]:
    """Results of functions, in the order of the calls; each is a Ray task.

    Args:
        calls: Function and arguments; it may depend on Ray tasks that are still running.
        folder: The job's: one that is another's by now ends it.

    Raises:
        ConfigError: what a task raised, if that is one.
        TryAgainError: if it failed in another way, or its node did.
    """
    import ray

    most = min(max(4, int(ray.cluster_resources().get("CPU", 1))), _MOST_TASKS)
    running: deque[Any] = deque()
    waiting = iter(calls)
    try:
        while True:
            # They take no core: whatever makes their arguments may hold all of them.
            for function, *arguments in waiting:
                running.append(ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(function).remote(*arguments))
                if len(running) >= most:
                    break
            if not running:
                return
            while not ray.wait([running[0]], timeout=1.0)[0]:
                folder.check()
            yield ray.get(running.popleft())
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ConfigError):
            raise cause from None
        raise TryAgainError(
            f"{folder.storage.shown}: the results could not be looked through ({reason(error)}): nothing was removed, run the "
            "same command again"
        ) from error


def _groups(parts: Mapping[str, PartFacts], references: str, target: float, *, in_order: bool) -> list[list[str]]:
    """Parts that are to become one: small ones together, others on their own if they are scored otherwise than is asked."""
    stale = {name for name, facts in parts.items() if facts.reference != references}
    if in_order:
        return [[name] for name in parts] if stale else []
    groups: list[list[str]] = []
    size = target
    for name, facts in parts.items():
        if name in stale or facts.size < target / 2:
            if size + facts.size > target:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += facts.size
    return [group for group in groups if len(group) > 1 or group[0] in stale]


def _rewrite(parts: Parts, name: str, references: str, names: list[str]) -> list[tuple[str, PartFacts]]:
    """Write parts as one, or as several where their columns differ; returns names and what is in them."""
    tables = (with_scores(table, references) for table in parts.read_all(names))
    same = groupby(tables, key=lambda table: table.schema)
    return [_write(parts, f"{name}-{number}", _row_groups(some), references) for number, (_, some) in enumerate(same)]


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, so many at a time that memory does not grow with their number."""
    held, num_bytes = [], 0
    for table in tables:
        held.append(table)
        num_bytes += table.nbytes
        if num_bytes >= _ROW_GROUP_BYTES:
            yield pa.concat_tables(held)
            held, num_bytes = [], 0
    if held:
        yield pa.concat_tables(held)


def _write(parts: Parts, name: str, tables: Iterable[pa.Table], references: str) -> tuple[str, PartFacts]:
    num_rows = num_errors = 0

    def counted() -> Iterator[pa.Table]:
        nonlocal num_rows, num_errors
        for table in tables:
            num_rows += len(table)
            num_errors += len(table) - table["error"].null_count
            yield table

    whole, size = parts.write_all(name, counted())
    return whole, PartFacts(size, num_rows, num_errors, references)


def _in_order(
    source: Source, folder: JobFolder, parts: Parts, finished: Finished, *, references: str, target: float
) -> dict[str, PartFacts]:
    """Write all rows once more in the input's order."""
    import ray.data

    places = {file.name: number for number, file in enumerate(source.files)}
    read = functools.partial(_read_part, parts=parts, places=places)
    before = list(finished.parts)
    names = ray.data.from_items([{"name": name} for name in before], override_num_blocks=len(before))
    rows = names.map_batches(read, batch_size=1, num_cpus=0.5).sort([FILE_NUMBER, "source_row"])
    bundles = rows.iter_internal_ref_bundles()
    blocks = (Rows(((entry.ref, 0, entry.metadata.num_rows),)) for bundle in bundles for entry in bundle.blocks)
    files = cut((block for block in blocks if len(block)), _rows_per_part(finished, target))
    calls = (
        (_write_rows, parts, f"ordered-{folder.token}-{number:06d}", references, spans, *tables)
        for number, file in enumerate(files)
        for spans, tables in [file.arguments()]
    )
    return dict(run_tasks(calls, folder))


def _rows_per_part(finished: Finished, target: float) -> int:
    size = sum(facts.size for facts in finished.parts.values())
    return max(1, int(finished.num_rows * target / max(1, size)))


def _read_part(batch: dict[str, Any], *, parts: Parts, places: dict[str, int]) -> Iterator[pa.Table]:
    for name in batch["name"]:
        # Scores are made when rows are written: parts of an earlier version have none.
        table = with_scores(parts.read(str(name)), "")
        numbers = [places[file] for file in table["source_file"].to_pylist()]
        yield table.append_column(FILE_NUMBER, pa.array(numbers, pa.int64()))


def _write_rows(
    parts: Parts, name: str, references: str, spans: list[tuple[int, int]], *tables: pa.Table
) -> tuple[str, PartFacts]:
    table = joined(spans, tables).drop_columns([FILE_NUMBER])
    return _write(parts, name, [with_scores(table, references)], references)


def _failed(parts: Parts, name: str) -> pa.Table:
    table = parts.read(name)
    return table.filter(pc.is_valid(table["error"]))
