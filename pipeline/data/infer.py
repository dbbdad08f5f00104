"""Rows as Python values (of JSON, CSV and text): their types, and their columns as arrays."""

import json
from decimal import Decimal
from itertools import chain
from typing import Any

import pyarrow as pa

from sere.pipeline.data.source import Bounds
from sere.pipeline.data.widen import NoCommonTypeError, join, merge

# Deeper values are their text: Arrow's own code and Python's stack have ends, too.
_DEPTH = 50


def infer_schema(rows: list[dict[str, Any]], bounds: Bounds) -> pa.Schema:
    """The schema of rows, which need not have the same keys.

    Args:
        rows: Values as `json` makes them, and `Decimal` for a number that no double holds.
        bounds: Gets those of these rows, too.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.schema([(name, _column_type([row.get(name) for row in rows], bounds, name)) for name in names])


def _column_type(values: list[Any], bounds: Bounds, path: str) -> pa.DataType:
    try:
        return _infer(values, bounds, path, _DEPTH)
    except NoCommonTypeError:
        return pa.string()


def _infer(values: list[Any], bounds: Bounds, path: str, depth: int) -> pa.DataType:
    kinds = set(map(type, values)) - {type(None)}
    if not kinds:
        return pa.null()
    if kinds == {str}:
        return pa.string()
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {float}:
        return pa.float64()
    if kinds <= {int, float}:
        whole = [value for value in values if type(value) is int]
        low, high = min(whole), max(whole)
        if low < -(2**63) or high >= 2**63:
            raise NoCommonTypeError
        merge(bounds, path, low, high)
        return join(pa.int64(), pa.float64(), {path: (low, high)}, path) if float in kinds else pa.int64()
    given = [value for value in values if value is not None]
    if kinds == {list} and depth:
        return pa.list_(_infer(list(chain.from_iterable(given)), bounds, f"{path}.item", depth - 1))
    if kinds == {dict} and depth:
        names = dict.fromkeys(name for value in given for name in value)
        return pa.struct(
            [(name, _infer([value.get(name) for value in given], bounds, f"{path}.{name}", depth - 1)) for name in names]
        )
    raise NoCommonTypeError


def storable(schema: pa.Schema) -> pa.Schema:
    """With objects that never have a field as text: parquet cannot hold them."""
    return pa.schema([(field.name, pa.string() if _has_empty_struct(field.type) else field.type) for field in schema])


def _has_empty_struct(kind: pa.DataType) -> bool:
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    return any(map(_has_empty_struct, inner)) or (pa.types.is_struct(kind) and not inner)


def array_of(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Values as an array; as text where that is the type.

    Raises:
        ValueError: if the type does not hold them all as they are.
    """
    if pa.types.is_string(kind):
        return pa.array([value if value is None or isinstance(value, str) else text_of(value) for value in values], kind)
    try:
        bounds: Bounds = {}
        if join(kind, _infer(values, bounds, "", _DEPTH), bounds, "").equals(kind):
            return pa.array(values, kind)
    except NoCommonTypeError:
        pass
    raise ValueError(f"there are values that are no {kind}, and there were none")


def text_of(value: Any) -> str:
    """The JSON text of a value that is no text itself; of what JSON does not know, such as a date, what Python prints."""
    try:
        return json.dumps(value, ensure_ascii=False, default=_no_decimal)
    except _DecimalInsideError:
        pass
    # `json` has no way to write one as a number.
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{json.dumps(str(key), ensure_ascii=False)}: {text_of(item)}" for key, item in value.items()) + "}"
        )
    return "[" + ", ".join(map(text_of, value)) + "]" if isinstance(value, list | tuple) else str(value)


class _DecimalInsideError(Exception):
    pass


def _no_decimal(value: Any) -> str:
    if isinstance(value, Decimal):
        raise _DecimalInsideError
    return str(value)
