"""Datasets on their way in and out: reading, the checks of a whole dataset, and the result's files."""

import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from calibration_jobs.inputs import find_files
from conf.schema import ConfigError, GenerateConfig
from pipeline.rows import RESULT_SCHEMA

if TYPE_CHECKING:
    import ray.data


def read_dataset(config: GenerateConfig) -> "ray.data.Dataset":
    """Read the input lazily.

    Raises:
        ConfigError: if there are no files, or they are damaged.
    """
    import ray.data

    kind, files = find_files(config.data)
    read = ray.data.read_parquet if kind == "parquet" else ray.data.read_json
    try:
        dataset = read([str(file.absolute()) for file in files])
    except (ray.exceptions.RayError, pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(config, error) from error
    return dataset.limit(config.num_rows) if config.num_rows is not None else dataset


def _unreadable(config: GenerateConfig, error: Exception) -> ConfigError:
    reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
    return ConfigError(f"{config.data} cannot be read ({reason}): mend the file")


def check_dataset(dataset: "ray.data.Dataset", config: GenerateConfig) -> int:
    """The number of rows, after the checks that need all of them: columns, and ids that are unique and not null.

    Raises:
        ConfigError: naming the column or id that is wrong.
    """
    import ray

    columns = [config.id_column, config.prompt_column]
    try:
        schema = dataset.schema()
        names = schema.names if schema is not None else []
        for key, column in zip(("id_column", "prompt_column"), columns, strict=True):
            if names and column not in names:
                raise ConfigError(f"{config.data} has no column {column!r} (there: {', '.join(names)}): set {key}")
        tables = [ray.get(ref) for ref in dataset.select_columns([config.id_column]).to_arrow_refs()] if names else []
        tables = [table for table in tables if table.num_rows]
    except (ray.exceptions.RayError, pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(config, error) from error
    ids = pa.chunked_array([chunk for table in tables for chunk in table[config.id_column].chunks]) if tables else []
    if len(ids) == 0:
        raise ConfigError(f"{config.data} has no rows")
    for name in names:
        if name in RESULT_SCHEMA.names:
            raise ConfigError(f"{config.data} has a column {name!r}, which the result would overwrite: rename it")
    prompt_type = dict(zip(names, schema.types, strict=True))[config.prompt_column]
    if not (pa.types.is_string(prompt_type) or pa.types.is_large_string(prompt_type) or pa.types.is_null(prompt_type)):
        raise ConfigError(f"column {config.prompt_column!r} of {config.data} is {prompt_type}, not text: set prompt_column")
    if ids.null_count:
        row = pc.index(pc.is_null(ids), True).as_py()
        raise ConfigError(f"row {row} of {config.data} has no {config.id_column!r}: every row needs a unique one")
    counts = pc.value_counts(ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise ConfigError(
            f"{config.id_column} {repeated[0]['values'].as_py()!r} occurs {repeated[0]['counts'].as_py()} times in "
            f"{config.data}: every row needs a unique one"
        )
    return len(ids)


class ResultFolder:
    """A folder of parquet files that appears whole or not at all: written beside its place, then renamed."""

    def __init__(self, output: str) -> None:
        """Raises:
        ConfigError: if the folder is already there.
        """
        self.path = Path(output)
        if self.path.exists():
            raise ConfigError(f"output {output} already exists: name another folder, or move that one away")
        self._aside = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")
        self._num_files = 0

    def write(self, table: pa.Table) -> None:
        """Add one file."""
        self._aside.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, self._aside / f"part-{self._num_files:05d}.parquet")
        self._num_files += 1

    def finish(self) -> None:
        """Put the folder in its place."""
        os.rename(self._aside, self.path)

    def discard(self) -> None:
        """Remove what was written, if it is not in its place."""
        shutil.rmtree(self._aside, ignore_errors=True)
