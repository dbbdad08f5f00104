"""The input as a whole: every file described in a Ray task, and one schema for all of them."""

from dataclasses import replace

import pyarrow as pa

from sere.conf.errors import ConfigError
from sere.conf.masking import mask_uri
from sere.pipeline.data.find import find_sources
from sere.pipeline.data.read import describe_file
from sere.pipeline.data.source import InputSpec, Source, SourceFile
from sere.pipeline.data.widen import widen


def scan_input(spec: InputSpec, *, num_rows: int | None = None) -> Source:
    """Find the files and read each once, in Ray tasks.

    Args:
        spec: Where they are.
        num_rows: Only the first rows; None: all.

    Raises:
        ConfigError: if there is no input, or it cannot be read.
    """
    import ray

    listing = find_sources(spec)
    describe = ray.remote(num_cpus=0.5)(describe_file)
    try:
        files = ray.get([describe.remote(listing, index) for index in range(len(listing.files))])
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, ConfigError) else error.as_instanceof_cause() from None
    return unify(listing, files, num_rows=num_rows)


def unify(source: Source, files: list[SourceFile], *, num_rows: int | None = None) -> Source:
    """The input with its described files: one schema, and only the first `num_rows` rows.

    Raises:
        ConfigError: if there are no rows.
    """
    schema: pa.Schema | None = None
    for file in files:
        schema = widen(schema, file.schema)
    if num_rows is not None:
        left, kept = num_rows, []
        for file in files:
            kept.append(replace(file, num_rows=min(left, file.num_rows)))
            left -= kept[-1].num_rows
        files = kept
    unified = replace(source, files=tuple(file for file in files if file.num_rows), schema=schema)
    if not unified.num_rows or schema is None:
        raise ConfigError(f"{mask_uri(source.spec.data)} has no rows")
    return unified
