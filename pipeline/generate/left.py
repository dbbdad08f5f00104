"""What is left to do: the input's rows less the finished ones, read in parallel and cut into batches."""

import functools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from sere.conf.errors import ConfigError, TryAgainError
from sere.conf.masking import mask_uri
from sere.conf.schema import GenerateConfig
from sere.pipeline.data.read import read_file
from sere.pipeline.data.source import PROMPT, Source
from sere.pipeline.generate.dispatch.prefixes import cut_at_prefixes, measure
from sere.pipeline.generate.dispatch.work import Batch, Rows, cut
from sere.pipeline.generate.parts import Finished
from sere.pipeline.generate.replica.requests import prompt_texts
from sere.pipeline.runtime.storage import first_line

# Small, so that the first rows of a large file arrive soon.
_BLOCK_BYTES = 16 * 2**20
_ROWS_PER_TABLE = 1024


def _read(batch: dict[str, Any], *, source: Any, config: GenerateConfig) -> Iterator[pa.Table]:
    """A Ray Data function: from a piece of a file to its rows that are left, with their prompts if rows go by those."""
    import ray

    described, finished = ray.get(source[0])
    prompts = prompt_texts(config) if config.group_by_prefix else None
    for index, *piece in zip(*(batch[key].tolist() for key in ("index", "first", "end")), strict=True):
        skip = finished.get(described.files[index].name)
        tables, num_bytes = [], 0
        for table in read_file(described, index, rows_per_table=_ROWS_PER_TABLE, skip=skip, piece=tuple(piece)):
            tables.append(table if prompts is None else table.append_column(PROMPT, prompts(table)))
            num_bytes += tables[-1].nbytes
            if num_bytes >= _BLOCK_BYTES:
                yield _in_one_piece(tables)
                tables, num_bytes = [], 0
        if tables:
            yield _in_one_piece(tables)


def _in_one_piece(tables: list[pa.Table]) -> pa.Table:
    """Every replica that is given a few of a block's rows opens all of its pieces: with a thousand of them that takes longer
    than the rows do.
    """
    return pa.concat_tables(tables).combine_chunks()


def _pieces_left(source: Source, finished: Finished) -> Iterator[dict[str, int]]:
    """The pieces of files that have rows which are not finished."""
    for index, file in enumerate(source.files):
        rows = finished.rows.get(file.name, np.array([], np.int64))
        for first, end in file.pieces:
            if np.diff(np.searchsorted(rows, (first, end)))[0] < end - first:
                yield {"index": index, "first": first, "end": end}


def read_batches(source: Source, finished: Finished, config: GenerateConfig) -> Iterator[Batch]:
    """The rows that are not finished, `batch_size` at a time, in the input's order or by `order_by` and by their prompts; they
    stay where Ray has read them.
    """
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    # Our own progress shows rows and tokens; Ray Data's shows operators.
    context.enable_progress_bars = False
    # It logs every failure with several tracebacks, before the exception that is handled here.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context.execution_options.preserve_order = True
    context.target_max_block_size = _BLOCK_BYTES
    left = list(_pieces_left(source, finished))
    if not left:
        return
    # In a list: as an argument of its own Ray Data would not let it through.
    reference = [ray.put((source, finished.rows))]
    read = functools.partial(_read, source=reference, config=config)
    rows = ray.data.from_items(left, override_num_blocks=len(left)).map_batches(read, batch_size=1, num_cpus=0.5)
    if order := [*config.order_by, *([PROMPT] if config.group_by_prefix else [])]:
        rows = rows.sort(order)
    bundles = rows.iter_internal_ref_bundles()
    blocks = (Rows(((entry.ref, 0, entry.metadata.num_rows),)) for bundle in bundles for entry in bundle.blocks)
    blocks = (block for block in blocks if len(block))
    try:
        if config.group_by_prefix:
            yield from cut_at_prefixes(measure(blocks), config.batch_size)
        else:
            yield from map(Batch, cut(blocks, config.batch_size))
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ConfigError):
            raise cause from None
        reason = f"{type(cause).__name__}: {mask_uri(first_line(cause))}"
        raise TryAgainError(
            f"{mask_uri(source.spec.data)} cannot be read ({reason}): run the same command again; what is finished is kept"
        ) from error
    except ray.exceptions.RayError as error:
        raise TryAgainError(
            f"Ray lost the reading of {mask_uri(source.spec.data)} ({first_line(error)}): run the same command again; what is "
            "finished is kept"
        ) from error
