"""The input: which files there are, what is in them, and their rows as tables. Plain functions; Ray tasks call them.

Every row has a place that never changes: the name of its file and its position in it. Rows that cannot be read keep their
place, with the reason in column `sere_problem`.
"""

import csv
import glob
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sere.conf.errors import ConfigError
from sere.conf.masking import mask_uri
from sere.conf.schema import GenerateConfig
from sere.pipeline.generate.replica.answers import RESULT_SCHEMA
from sere.pipeline.runtime.storage import open_filesystem

PROBLEM = "sere_problem"
PLACE = "sere_file"
"""Number of a row's file, while rows are put in order."""
_LINES = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text", ".text": "text"}
_SUFFIXES = {".parquet": "parquet", **_LINES}
_COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_SCAN_ROWS = 5_000
# What stores call that which changes with a file's content.
_TAGS = ("ETag", "etag", "md5Hash", "Content-MD5", "LastModified", "Last-Modified", "mtime", "created")
# Bytes that are not UTF-8, as "surrogateescape" decodes them.
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
Kind = Literal["parquet", "json", "csv", "text", "huggingface"]


@dataclass(frozen=True)
class SourceFile:
    """A file, or a split of a Hugging Face dataset."""

    name: str
    """What ids are made of: the path below the folder that all files share."""
    path: str
    """For the file system of `Source.data`."""
    num_rows: int = 0
    fingerprint: str = ""
    """Of the contents, where they can be read cheaply; else what the file system says changes with them."""
    schema: pa.Schema | None = None


@dataclass(frozen=True)
class Source:
    """The input. Picklable."""

    kind: Kind
    files: tuple[SourceFile, ...]
    config: GenerateConfig
    schema: pa.Schema | None = None
    """The input's columns, as results have them."""

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Per file what tells it from another of the same name."""
        return {file.name: f"{file.num_rows} rows, {file.fingerprint}" for file in self.files}


def find_sources(config: GenerateConfig) -> Source:
    """List the input's files, unread.

    Raises:
        ConfigError: if there are none, or of several kinds.
    """
    if config.data_format == "huggingface" or (config.data_format == "auto" and _is_saved_dataset(config.data)):
        return Source("huggingface", (SourceFile(config.data_split, config.data),), config)
    filesystem, root = open_filesystem(config.data, config.storage_options)
    try:
        paths = _list(filesystem, root)
    except Exception as error:
        # Every kind of storage has errors of its own.
        raise ConfigError(f"data {mask_uri(config.data)} cannot be listed ({mask_uri(_first_line(error))})") from error
    if not paths:
        if (
            config.data_format == "auto"
            and re.fullmatch(r"[\w.-]+/[\w.-]+", config.data)
            and "." not in config.data.split("/")[1]
        ):
            # Not a path here: a dataset of the hub.
            return Source("huggingface", (SourceFile(config.data_split, config.data),), config)
        raise ConfigError(
            f"no data at {mask_uri(config.data)} (seen from {os.getcwd()}): give a parquet, JSONL, CSV or text file, a folder "
            "of them, a glob, a Hugging Face dataset, or an fsspec URI of one of these"
        )
    kinds = {_kind(path) if config.data_format == "auto" else config.data_format for path in paths}
    if len(kinds) > 1 or None in kinds:
        shown = ", ".join(sorted({os.path.splitext(path)[1] or "no suffix" for path in paths}))
        raise ConfigError(
            f"{mask_uri(config.data)} has files of several or unknown kinds ({shown}): set data_format, or give a glob"
        )
    shared = os.path.dirname(paths[0]) if len(paths) == 1 else os.path.commonpath(paths)
    files = sorted((SourceFile(os.path.relpath(path, shared), path) for path in paths), key=lambda file: file.name)
    return Source(kinds.pop(), tuple(files), config)


def _is_saved_dataset(data: str) -> bool:
    return os.path.isdir(data) and any(os.path.isfile(f"{data}/{name}") for name in ("state.json", "dataset_dict.json"))


def _list(filesystem: Any, root: str) -> list[str]:
    if glob.has_magic(root) and not filesystem.exists(root):
        return sorted(path for path in filesystem.glob(root) if filesystem.isfile(path))
    if filesystem.isfile(root):
        return [root]
    if not filesystem.isdir(root):
        return []
    found = [path for path in filesystem.find(root) if _kind(path) is not None]
    below = len(root.rstrip("/")) + 1
    return sorted(path for path in found if not any(part[:1] in "._" for part in path[below:].split("/")))


def _kind(path: str) -> str | None:
    stem, suffix = os.path.splitext(path.lower())
    return _SUFFIXES.get(os.path.splitext(stem)[1] if suffix in _COMPRESSIONS else suffix)


def describe_file(source: Source, index: int) -> SourceFile:
    """Read a file once: its rows, its fingerprint, its columns.

    Raises:
        ConfigError: if it cannot be read.
    """
    file = source.files[index]
    try:
        if source.kind == "huggingface":
            dataset = _load(source.config)
            schema = dataset.features.arrow_schema.remove_metadata()
            return replace(file, num_rows=len(dataset), fingerprint=dataset._fingerprint, schema=_plain(schema))
        filesystem, _ = open_filesystem(source.config.data, source.config.storage_options)
        described = replace(file, fingerprint=_fingerprint(filesystem, file.path))
        if source.kind == "parquet":
            with filesystem.open(file.path, "rb") as opened, pq.ParquetFile(opened) as parquet:
                return replace(described, num_rows=parquet.metadata.num_rows, schema=_plain(parquet.schema_arrow))
        num_rows, schema = 0, None
        rows = _rows(source, file)
        while chunk := list(islice(rows, _SCAN_ROWS)):
            num_rows += len(chunk)
            schema = _widen(schema, _schema_of([row for row, _ in chunk if row is not None]))
        return replace(described, num_rows=num_rows, schema=schema or pa.schema([]))
    except ConfigError:
        raise
    except Exception as error:
        # Arrow, file systems and decompression have errors of their own.
        raise _damaged(source, file, error) from error


def unify(source: Source, files: list[SourceFile]) -> Source:
    """The input with its described files: one schema, and only the first `num_rows` rows.

    Raises:
        ConfigError: if there are no rows, or a column is missing, of the wrong type, or named like one of the results'.
    """
    config = source.config
    schema: pa.Schema | None = None
    for file in files:
        schema = _widen(schema, file.schema)
    if config.num_rows is not None:
        left, kept = config.num_rows, []
        for file in files:
            kept.append(replace(file, num_rows=min(left, file.num_rows)))
            left -= kept[-1].num_rows
        files = kept
    unified = replace(source, files=tuple(file for file in files if file.num_rows), schema=schema)
    if not unified.num_rows or schema is None:
        raise ConfigError(f"{mask_uri(config.data)} has no rows")
    _check_columns(unified)
    return unified


def _check_columns(source: Source) -> None:
    config, schema = source.config, source.schema
    shown = mask_uri(config.data)
    wanted = {"sampling_column": config.sampling_column, "lora_column": config.lora_column}
    if config.messages_column is not None:
        wanted["messages_column"] = config.messages_column
    elif config.template is None:
        wanted["prompt_column"] = config.prompt_column
    else:
        for name in sorted(template_columns(config.template)):
            wanted[f"template (it uses {name!r})"] = name
    for key, column in wanted.items():
        if column is not None and column not in schema.names:
            raise ConfigError(f"{shown} has no column {column!r} (there: {', '.join(schema.names)}): set {key}")
    for name in schema.names:
        if name in RESULT_SCHEMA.names or name in (PROBLEM, PLACE):
            raise ConfigError(f"{shown} has a column {name!r}, which the result would overwrite: rename it")
        if schema.names.count(name) > 1:
            raise ConfigError(f"{shown} has two columns {name!r}: rename one")
    if config.id_column in RESULT_SCHEMA.names:
        raise ConfigError(f"id_column {config.id_column!r} is a column of the results: choose another name")
    for column in config.order_by:
        if column not in schema.names or pa.types.is_nested(schema.field(column).type):
            raise ConfigError(
                f"{shown} has no column {column!r} of plain values (there: {', '.join(schema.names)}): set order_by"
            )
    if "prompt_column" in wanted:
        kind = schema.field(config.prompt_column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            raise ConfigError(f"column {config.prompt_column!r} of {shown} is {kind}, not text: set prompt_column")


def template_columns(template: str) -> set[str]:
    """The columns that a template uses.

    Raises:
        ConfigError: if it is no template.
    """
    import jinja2
    import jinja2.meta

    try:
        return jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(template))
    except jinja2.TemplateError as error:
        raise ConfigError(f"template is not a Jinja template ({error}): {template!r}") from error


def read_file(source: Source, index: int, *, rows_per_table: int, skip: np.ndarray | None = None) -> Iterator[pa.Table]:
    """A file's rows in order: the input's columns, `source_file`, `source_row` and `sere_problem` ("" if there is none).

    Args:
        source: From `unify`.
        index: Of the file.
        rows_per_table: Most rows of a table.
        skip: int64, sorted: positions that are left out.

    Raises:
        ConfigError: if the file cannot be read.
    """
    file = source.files[index]
    try:
        start = 0
        for table, problems in _tables(source, file, rows_per_table):
            table = table.slice(0, file.num_rows - start)
            positions = np.arange(start, start + len(table))
            start += len(table)
            keep = np.ones(len(table), bool) if skip is None else ~np.isin(positions, skip, assume_unique=True)
            if keep.any():
                columns = [_fit(table, field) for field in source.schema]
                names = pa.array([file.name], pa.string()).take(pa.array(np.zeros(len(table), np.int64)))
                problem = pa.array((problems or [""] * len(table))[: len(table)], pa.string())
                whole = pa.table(
                    [*columns, names, pa.array(positions, pa.int64()), problem],
                    schema=pa.schema(
                        [*source.schema, *(RESULT_SCHEMA.field(n) for n in ("source_file", "source_row")), _PROBLEM]
                    ),
                )
                yield whole.filter(pa.array(keep))
            if start >= file.num_rows:
                return
    except ConfigError:
        raise
    except Exception as error:
        raise _damaged(source, file, error) from error
    raise ConfigError(f"{file.name} has become shorter: it had {file.num_rows} rows, and now {start}")


_PROBLEM = pa.field(PROBLEM, pa.string())


def _tables(source: Source, file: SourceFile, rows_per_table: int) -> Iterator[tuple[pa.Table, list[str] | None]]:
    if source.kind == "huggingface":
        dataset = _load(source.config).with_format("arrow")
        for start in range(0, len(dataset), rows_per_table):
            yield dataset[start : start + rows_per_table], None
    elif source.kind == "parquet":
        filesystem, _ = open_filesystem(source.config.data, source.config.storage_options)
        with filesystem.open(file.path, "rb") as opened, pq.ParquetFile(opened) as parquet:
            for batch in parquet.iter_batches(batch_size=rows_per_table):
                yield pa.Table.from_batches([batch]), None
    else:
        rows = _rows(source, file)
        while chunk := list(islice(rows, rows_per_table)):
            dicts = [row or {} for row, _ in chunk]
            arrays, problems = [], [problem for _, problem in chunk]
            for field in source.schema:
                values = [row.get(field.name) for row in dicts]
                arrays.append(_array(values, field.type))
            if source.kind == "json" and source.config.template is None and source.config.messages_column is None:
                name = source.config.prompt_column
                for index, row in enumerate(dicts):
                    value = row.get(name)
                    if value is not None and not isinstance(value, str):
                        problems[index] = f"{name} is not text but {type(value).__name__}"
            yield pa.table(arrays, schema=source.schema), problems


def _rows(source: Source, file: SourceFile) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """Rows of a file of lines, and what is wrong with each: a bad one has no columns."""
    filesystem, _ = open_filesystem(source.config.data, source.config.storage_options)
    zstd = file.path.endswith(".zst")
    with filesystem.open(file.path, "rb", compression=None if zstd else "infer") as opened:
        # fsspec needs one more package for zstd; pyarrow does not.
        raw = pa.CompressedInputStream(opened, "zstd") if zstd else opened
        lines = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        if source.kind == "text":
            for number, line in enumerate(lines, start=1):
                if _NOT_UTF8.search(line):
                    yield None, f"line {number} is not UTF-8"
                else:
                    yield {source.config.prompt_column: line.rstrip("\r\n")}, ""
        elif source.kind == "csv":
            yield from _csv_rows(lines, "\t" if ".tsv" in file.path else ",")
        else:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                if _NOT_UTF8.search(line):
                    yield None, f"line {number} is not UTF-8"
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if number == 1 and (isinstance(row, list) or line.strip() == "["):
                    raise ValueError("it is one JSON array, where one object a line is needed: jq -c '.[]' converts it")
                good = isinstance(row, dict)
                yield (row if good else None), ("" if good else f"line {number} is not a JSON object")


def _csv_rows(lines: io.TextIOWrapper, delimiter: str) -> Iterator[tuple[dict[str, Any] | None, str]]:
    # A field may hold a long document.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header = next(reader, [])
    if len(set(header)) < len(header):
        name = next(name for name in header if header.count(name) > 1)
        raise ValueError(f"two columns are named {name!r}")
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                # The rest of the file would pass for one field of one bad row.
                raise ValueError(f"the row of line {first} opens a quote that nothing closes") from error
            yield None, f"line {reader.line_num} is malformed: {error}"
            continue
        if not fields:
            continue
        if any(_NOT_UTF8.search(field) for field in fields):
            yield None, f"line {reader.line_num} is not UTF-8"
        elif len(fields) == len(header):
            yield dict(zip(header, fields, strict=True)), ""
        else:
            yield None, f"line {reader.line_num} has {len(fields)} fields, the header {len(header)}"


def _schema_of(rows: list[dict[str, Any]]) -> pa.Schema:
    names = list(dict.fromkeys(name for row in rows for name in row))
    kinds = {name: _array([row.get(name) for row in rows], None).type for name in names}
    return pa.schema([(name, pa.string() if _has_empty_struct(kind) else kind) for name, kind in kinds.items()])


def _has_empty_struct(kind: pa.DataType) -> bool:
    """What parquet cannot hold."""
    if pa.types.is_struct(kind):
        return not kind.num_fields or any(_has_empty_struct(kind.field(number).type) for number in range(kind.num_fields))
    return pa.types.is_list(kind) and _has_empty_struct(kind.value_type)


def _array(values: list[Any], kind: pa.DataType | None) -> pa.Array:
    """Values as an array; those that are not of one type as their JSON text."""
    try:
        if kind is None or not pa.types.is_string(kind):
            return pa.array(values, kind)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        pass
    texts = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False, default=str) for v in values]
    # A lone surrogate, which JSON allows and UTF-8 does not.
    return pa.array([None if text is None else text.encode("utf-8", "replace").decode() for text in texts], pa.string())


def _widen(one: pa.Schema | None, other: pa.Schema | None) -> pa.Schema | None:
    """A schema for the rows of both; where types have nothing in common, text."""
    if one is None or other is None:
        return one or other
    fields = {field.name: field.type for field in one}
    for field in other:
        known = fields.get(field.name, field.type)
        try:
            pair = [pa.schema([(field.name, known)]), pa.schema([(field.name, field.type)])]
            fields[field.name] = pa.unify_schemas(pair, promote_options="permissive").field(0).type
        except pa.ArrowException:
            fields[field.name] = pa.string()
    return pa.schema(list(fields.items()))


def _plain(schema: pa.Schema) -> pa.Schema:
    """Without metadata, and with dictionaries as what they stand for."""
    return pa.schema([(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in schema])


def _fit(table: pa.Table, field: pa.Field) -> pa.ChunkedArray | pa.Array:
    if field.name not in table.column_names:
        return pa.nulls(len(table), field.type)
    column = table[field.name]
    if column.type == field.type:
        return column
    try:
        return column.cast(field.type)
    except pa.ArrowException:
        return _array(column.to_pylist(), field.type)


def _fingerprint(filesystem: Any, path: str) -> str:
    if "file" not in filesystem.protocol:
        # fsspec's `ukey` covers all that a store says, which is more when a file is asked for than when its folder is listed.
        info = filesystem.info(path)
        tag = next((info[name] for name in _TAGS if info.get(name)), None)
        return f"{info.get('size')} bytes, {tag}" if tag else str(filesystem.ukey(path))
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _load(config: GenerateConfig) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        if os.path.isdir(config.data) and _is_saved_dataset(config.data):
            loaded = datasets.load_from_disk(config.data)
            return loaded[config.data_split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(config.data, split=config.data_split, revision=config.data_revision)
    except Exception as error:
        # The hub, the file system and the builders have errors of their own.
        raise ConfigError(
            f"data {config.data} is no file here, and no Hugging Face dataset with split {config.data_split!r} that loads "
            f"({type(error).__name__}: {_first_line(error)}): check data, data_split and data_revision"
        ) from error


def _damaged(source: Source, file: SourceFile, error: Exception) -> ConfigError:
    where = mask_uri(file.path)
    return ConfigError(f"{where} cannot be read ({mask_uri(_first_line(error))}): mend the file, or leave it out of data")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
