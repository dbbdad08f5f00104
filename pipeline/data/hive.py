"""Folders that are named for what is in them (`split=train/`): each such name is a column of the rows below it."""

import re
from collections.abc import Iterable
from urllib.parse import unquote

import pyarrow as pa

from sere.conf.errors import ConfigError
from sere.conf.masking import mask_uri
from sere.pipeline.data.source import SourceFile

_NULL = "__HIVE_DEFAULT_PARTITION__"
# No leading zero and no plus: the number's text is the folder's.
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")


def partition_of(path: str, base: str) -> dict[str, str | None]:
    """The columns that a file's folders below `base` give.

    Raises:
        ConfigError: if two of them give the same.
    """
    found: dict[str, str | None] = {}
    for part in path[len(base) :].split("/")[:-1]:
        name, sign, value = part.partition("=")
        if not sign or not name:
            continue
        name = unquote(name)
        if name in found:
            raise ConfigError(f"{mask_uri(path)} is in two folders that are named for {name!r}: rename one")
        found[name] = None if value == _NULL else unquote(value)
    return found


def partition_schema(files: Iterable[SourceFile]) -> pa.Schema:
    """The columns that folders give: integers where all of a column are, else text.

    Raises:
        ConfigError: if a file has a column of that name itself.
    """
    files = list(files)
    values: dict[str, list[str]] = {}
    for file in files:
        for name, value in file.partition.items():
            values.setdefault(name, []).extend([] if value is None else [value])
    for file in files:
        for name in file.schema.names if file.schema is not None else ():
            if name in values:
                raise refused(file, name)
    whole = {name: bool(found) and all(map(_WHOLE.fullmatch, found)) for name, found in values.items()}
    return pa.schema([(name, pa.int64() if whole[name] else pa.string()) for name in values])


def add_partition(table: pa.Table, num_rows: int, file: SourceFile, schema: pa.Schema | None) -> pa.Table:
    """A table of a file with the columns that its folders give.

    Args:
        table: Without columns it has no rows, however many the file has.
        num_rows: Of the file, in the table.
        file: Where they are from.
        schema: With the columns' types; None: they are text.

    Raises:
        ConfigError: if the table has such a column itself.
    """
    if not file.partition:
        return table
    columns = {name: table[name] for name in table.column_names}
    for name, value in file.partition.items():
        if name in columns:
            raise refused(file, name)
        kind = pa.string() if schema is None else schema.field(name).type
        whole = int(value) if value is not None and pa.types.is_int64(kind) else value
        columns[name] = pa.repeat(pa.scalar(whole, kind), num_rows)
    return pa.table(columns)


def refused(file: SourceFile, name: str) -> ConfigError:
    """What is said of a column that is both in a file and in its folder's name."""
    return ConfigError(
        f"{mask_uri(file.path)} has a column {name!r}, which is also the name of a folder ({name}=...): rename one of them"
    )
