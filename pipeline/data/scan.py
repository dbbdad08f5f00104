"""The input as a whole: every file described in a Ray task, and one schema for all of them."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa

from sere.conf.errors import ConfigError, TryAgainError
from sere.conf.masking import mask_uri
from sere.pipeline.data.describe import describe_file
from sere.pipeline.data.find import find_sources
from sere.pipeline.data.hive import partition_schema
from sere.pipeline.data.infer import storable
from sere.pipeline.data.known import recall, to_keep
from sere.pipeline.data.source import Bounds, InputSpec, Source, SourceFile
from sere.pipeline.data.widen import NoCommonTypeError, holds_bytes, is_text, join, merge, text_for
from sere.pipeline.runtime.storage import first_line

_log = logging.getLogger(__name__)


def scan_input(spec: InputSpec, *, num_rows: int | None = None) -> Source:
    """Find the files and read each once, in Ray tasks.

    Args:
        spec: Where they are.
        num_rows: Only the first rows; None: all.

    Raises:
        ConfigError: if there is no input, or it cannot be read.
    """
    return scan_known(spec, num_rows=num_rows, known={})[0]


def scan_known(
    spec: InputSpec, *, num_rows: int | None = None, known: Mapping[str, Any]
) -> tuple[Source, dict[str, dict[str, Any]]]:
    """As `scan_input`, but files that are described already, and unchanged since, are not read.

    Args:
        spec: Where they are.
        num_rows: Only the first rows; None: all.
        known: What an earlier call gave, by file name.

    Returns:
        The input, and the descriptions to keep, as JSON values.

    Raises:
        ConfigError: if there is no input, or it cannot be read.
    """
    import ray

    listing = find_sources(spec)
    files = [recall(listing, file, known.get(file.name)) for file in listing.files]
    describe = ray.remote(num_cpus=0.5)(describe_file)
    source = ray.put(listing)
    tasks = {index: describe.remote(source, index) for index, file in enumerate(files) if file is None}
    try:
        described = dict(zip(tasks, ray.get(list(tasks.values())), strict=True))
    except ray.exceptions.RayTaskError as error:
        raise _of_task(listing, error) from error.cause
    except ray.exceptions.RayError as error:
        # A lost worker or node, or one that ran out of memory: Ray's own text is a page.
        raise TryAgainError(
            f"{mask_uri(listing.spec.data)} could not be looked through: the Ray cluster lost a worker "
            f"({type(error).__name__}): run the same command again"
        ) from error
    whole = [described[index] if file is None else file for index, file in enumerate(files)]
    return unify(listing, whole, num_rows=num_rows), {file.name: kept for file in whole if (kept := to_keep(listing, file))}


def _of_task(source: Source, error: Any) -> ConfigError:
    if isinstance(error.cause, ConfigError):
        return error.cause
    return ConfigError(
        f"{mask_uri(source.spec.data)} could not be looked through on the Ray cluster ({type(error.cause).__name__}: "
        f"{mask_uri(first_line(error.cause))}): check that all nodes have the same versions of this package and what it needs"
    )


def unify(source: Source, files: list[SourceFile], *, num_rows: int | None = None) -> Source:
    """The input with its described files: one schema, and only the first `num_rows` rows.

    Files that give no row have no say in the schema: it is the same whenever the same rows are.

    Raises:
        ConfigError: if there are no rows, or no type holds a column of all files.
    """
    left = sum(file.num_rows for file in files) if num_rows is None else num_rows
    kept = []
    for file in files:
        if (taken := min(left, file.num_rows)) > 0:
            kept.append(replace(file, num_rows=taken))
            left -= taken
    if not kept:
        raise ConfigError(f"{mask_uri(source.spec.data)} has no rows")
    partition = partition_schema(kept)
    return replace(source, files=tuple(kept), schema=pa.schema([*storable(_schema_of(kept)), *partition]))


def _schema_of(files: list[SourceFile]) -> pa.Schema:
    bounds: Bounds = {}
    for file in files:
        for path, (low, high) in file.bounds.items():
            merge(bounds, path, low, high)
    fields: dict[str, pa.DataType] = {}
    # Of each column: the first file that says more of it than that it is text, and whether text is all that holds it.
    firsts: dict[str, tuple[str, pa.DataType]] = {}
    as_text: set[str] = set()
    for file in files:
        for field in file.schema or ():
            name, kind = field.name, field.type
            before = fields.get(name, pa.null())
            where, first = firsts.get(name, (file.path, kind))
            if name not in firsts or is_text(first) or pa.types.is_null(first):
                firsts[name] = (file.path, kind)
            try:
                if name in as_text and not (is_text(kind) or pa.types.is_null(kind)):
                    raise NoCommonTypeError
                fields[name] = join(before, kind, bounds, name)
                continue
            except NoCommonTypeError:
                pass
            these = f"column {name!r} is {first} in {mask_uri(where)} and {kind} in {mask_uri(file.path)}"
            if holds_bytes(before) or holds_bytes(kind):
                raise ConfigError(f"{these}, and no type holds both as they are: convert one, or leave one of the files out")
            if name not in as_text:
                _log.warning("%s: it is text in the results, as no other type holds every value as it is", these)
            fields[name] = text_for(before, kind)
            as_text.add(name)
    return pa.schema(list(fields.items()))
