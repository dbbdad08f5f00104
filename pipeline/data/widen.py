"""Schemas and values of rows that do not agree: the narrowest type that holds all, at last text."""

import json
from typing import Any

import pyarrow as pa


def schema_of(rows: list[dict[str, Any]]) -> pa.Schema:
    """The schema of rows as dicts, which need not have the same keys."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    kinds = {name: array_of([row.get(name) for row in rows], None).type for name in names}
    return pa.schema([(name, pa.string() if _has_empty_struct(kind) else kind) for name, kind in kinds.items()])


def _has_empty_struct(kind: pa.DataType) -> bool:
    """What parquet cannot hold."""
    if pa.types.is_struct(kind):
        return not kind.num_fields or any(_has_empty_struct(kind.field(number).type) for number in range(kind.num_fields))
    return pa.types.is_list(kind) and _has_empty_struct(kind.value_type)


def array_of(values: list[Any], kind: pa.DataType | None) -> pa.Array:
    """Values as an array; those that are not of one type as their JSON text."""
    try:
        if kind is None or not pa.types.is_string(kind):
            return pa.array(values, kind)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        pass
    texts = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False, default=str) for v in values]
    # A lone surrogate, which JSON allows and UTF-8 does not.
    return pa.array([None if text is None else text.encode("utf-8", "replace").decode() for text in texts], pa.string())


def widen(one: pa.Schema | None, other: pa.Schema | None) -> pa.Schema | None:
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


def plain(schema: pa.Schema) -> pa.Schema:
    """Without metadata, and with dictionaries as what they stand for."""
    return pa.schema([(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in schema])


def fit(table: pa.Table, field: pa.Field) -> pa.ChunkedArray | pa.Array:
    """A column of a table as a field of the common schema; null where the table lacks it."""
    if field.name not in table.column_names:
        return pa.nulls(len(table), field.type)
    column = table[field.name]
    if column.type == field.type:
        return column
    try:
        return column.cast(field.type)
    except pa.ArrowException:
        return array_of(column.to_pylist(), field.type)
