"""Types and schemas of data that do not agree: the narrowest type that holds every value of both as it is, at last text.

No value becomes another one. Integers beside floats are floats only where every integer is known to be one that a double
holds; all else that has no common type becomes its text, which says the same number.
"""

import pyarrow as pa
import pyarrow.types as pt

from sere.pipeline.data.source import Bounds

_NS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_UNITS = ("s", "ms", "us", "ns")
# Every integer up to here is a double.
_DOUBLE = 2**53


class NoCommonTypeError(Exception):
    """Two types that nothing but text holds."""


def widen(one: pa.Schema | None, other: pa.Schema, bounds: Bounds) -> pa.Schema:
    """A schema for the rows of both; columns that have nothing in common are text.

    Args:
        one: None: there is none yet.
        other: Its columns come after those of `one`.
        bounds: Of both together.
    """
    fields = {} if one is None else {field.name: field.type for field in one}
    for field in other:
        try:
            fields[field.name] = join(fields.get(field.name, pa.null()), field.type, bounds, field.name)
        except NoCommonTypeError:
            fields[field.name] = text_for(fields[field.name], field.type)
    return pa.schema(list(fields.items()))


def join(one: pa.DataType, other: pa.DataType, bounds: Bounds, path: str) -> pa.DataType:
    """The narrowest type that holds every value of both exactly.

    Args:
        one: As `plain` makes them.
        other: As `plain` makes them.
        bounds: Of all files together.
        path: Of the column, or of what is nested in it, in `bounds`.

    Raises:
        NoCommonTypeError: if there is none.
    """
    if isinstance(one, pa.BaseExtensionType) and not one.equals(other):
        return join(one.storage_type, other, bounds, path)
    if isinstance(other, pa.BaseExtensionType) and not one.equals(other):
        return join(one, other.storage_type, bounds, path)
    if one.equals(other) or pt.is_null(other):
        return one
    if pt.is_null(one):
        return other
    pair = (one, other)
    for are, joined in _JOINS:
        if all(are(kind) for kind in pair):
            return joined(one, other, bounds, path)
    raise NoCommonTypeError


def text_for(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type of text for two types that have nothing else in common."""
    return pa.large_string() if any(map(pt.is_large_string, (one, other))) else pa.string()


def limits(kind: pa.DataType) -> tuple[int, int] | None:
    """The lowest and highest number of a type, in nanoseconds where it is of time; None where `bounds` has no such."""
    if pt.is_integer(kind):
        if pt.is_signed_integer(kind):
            return -(2 ** (kind.bit_width - 1)), 2 ** (kind.bit_width - 1) - 1
        return 0, 2**kind.bit_width - 1
    if pt.is_timestamp(kind) or pt.is_duration(kind):
        return -(2**63) * _NS[kind.unit], (2**63 - 1) * _NS[kind.unit]
    return None


def nanoseconds(kind: pa.DataType) -> int:
    """In a unit of a type: 1 for integers."""
    return _NS[kind.unit] if pt.is_timestamp(kind) or pt.is_duration(kind) else 1


def merge(bounds: Bounds, path: str, low: int, high: int) -> None:
    """Note that numbers from `low` to `high` are at a path."""
    before = bounds.get(path, (low, high))
    bounds[path] = (min(low, before[0]), max(high, before[1]))


def _known(one: pa.DataType, other: pa.DataType, bounds: Bounds, path: str) -> tuple[int, int]:
    if path in bounds:
        return bounds[path]
    both = [found for kind in (one, other) if (found := limits(kind)) is not None]
    return min(low for low, _ in both), max(high for _, high in both)


def _integers(one: pa.DataType, other: pa.DataType, bounds: Bounds, path: str) -> pa.DataType:
    wide = max(one, other, key=lambda kind: kind.bit_width)
    if pt.is_signed_integer(one) == pt.is_signed_integer(other):
        return wide
    unsigned, signed = (one, other) if pt.is_signed_integer(other) else (other, one)
    if unsigned.bit_width < signed.bit_width:
        return signed
    if unsigned.bit_width < 64:
        return {8: pa.int16(), 16: pa.int32(), 32: pa.int64()}[unsigned.bit_width]
    low, high = _known(one, other, bounds, path)
    if high < 2**63:
        return pa.int64()
    if low >= 0:
        return pa.uint64()
    raise NoCommonTypeError


def _numbers(one: pa.DataType, other: pa.DataType, bounds: Bounds, path: str) -> pa.DataType:
    """Floats of any width, or an integer and a float."""
    if pt.is_floating(one) and pt.is_floating(other):
        return max(one, other, key=lambda kind: kind.bit_width)
    low, high = _known(one, other, bounds, path)
    if low >= -_DOUBLE and high <= _DOUBLE:
        return pa.float64()
    raise NoCommonTypeError


def _decimals(one: pa.DataType, other: pa.DataType, bounds: Bounds, path: str) -> pa.DataType:
    """Decimals, or one and an integer."""
    whole = scale = 0
    for kind in (one, other):
        if pt.is_decimal(kind):
            whole, scale = max(whole, kind.precision - kind.scale), max(scale, kind.scale)
        else:
            low, high = limits(kind) or (0, 0)
            whole = max(whole, len(str(max(-low, high))))
    if whole + scale > 76:
        raise NoCommonTypeError
    return pa.decimal128(whole + scale, scale) if whole + scale <= 38 else pa.decimal256(whole + scale, scale)


def _spans(one: pa.DataType, other: pa.DataType, bounds: Bounds, path: str) -> pa.DataType:
    """Timestamps, which are instants or have no zone, or durations."""
    unit = max(one.unit, other.unit, key=_UNITS.index)
    low, high = _known(one, other, bounds, path)
    if one.unit != other.unit and not -(2**63) <= low // _NS[unit] <= high // _NS[unit] < 2**63:
        raise NoCommonTypeError
    if pt.is_duration(one):
        return pa.duration(unit)
    if (one.tz is None) != (other.tz is None):
        raise NoCommonTypeError
    return pa.timestamp(unit, one.tz if one.tz == other.tz else "UTC")


def _times(one: pa.DataType, other: pa.DataType, bounds: Bounds, path: str) -> pa.DataType:
    unit = max(one.unit, other.unit, key=_UNITS.index)
    return pa.time32(unit) if unit in ("s", "ms") else pa.time64(unit)


def _texts(one: pa.DataType, other: pa.DataType, bounds: Bounds, path: str) -> pa.DataType:
    """Text and bytes: the bytes of text say the same."""
    large = any(pt.is_large_string(kind) or pt.is_large_binary(kind) for kind in (one, other))
    if all(is_text(kind) for kind in (one, other)):
        return pa.large_string() if large else pa.string()
    return pa.large_binary() if large else pa.binary()


def _lists(one: pa.DataType, other: pa.DataType, bounds: Bounds, path: str) -> pa.DataType:
    inner = join(one.value_type, other.value_type, bounds, f"{path}.item")
    if all(pt.is_fixed_size_list(kind) for kind in (one, other)) and one.list_size == other.list_size:
        return pa.list_(inner, one.list_size)
    return pa.large_list(inner) if any(pt.is_large_list(kind) for kind in (one, other)) else pa.list_(inner)


def _structs(one: pa.DataType, other: pa.DataType, bounds: Bounds, path: str) -> pa.DataType:
    fields = {field.name: field.type for field in one}
    if len(fields) < one.num_fields or len({field.name for field in other}) < other.num_fields:
        raise NoCommonTypeError
    for field in other:
        fields[field.name] = join(fields.get(field.name, pa.null()), field.type, bounds, f"{path}.{field.name}")
    return pa.struct(list(fields.items()))


def _maps(one: pa.DataType, other: pa.DataType, bounds: Bounds, path: str) -> pa.DataType:
    keys = join(one.key_type, other.key_type, bounds, f"{path}.key")
    return pa.map_(keys, join(one.item_type, other.item_type, bounds, f"{path}.item"))


def is_text(kind: pa.DataType) -> bool:
    return pt.is_string(kind) or pt.is_large_string(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_fixed_size_binary(kind)


def is_list(kind: pa.DataType) -> bool:
    """Of any kind but views."""
    return pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether there are bytes in it, which have no text."""
    if isinstance(kind, pa.BaseExtensionType):
        return holds_bytes(kind.storage_type)
    return _is_bytes(kind) or any(holds_bytes(kind.field(number).type) for number in range(kind.num_fields))


# In this order: the first pair of types that fits.
_JOINS = (
    (pt.is_integer, _integers),
    (lambda kind: pt.is_integer(kind) or pt.is_floating(kind), _numbers),
    (lambda kind: pt.is_integer(kind) or pt.is_decimal(kind), _decimals),
    (pt.is_timestamp, _spans),
    (pt.is_duration, _spans),
    (pt.is_time, _times),
    (pt.is_date, lambda *_: pa.date64()),
    (lambda kind: is_text(kind) or _is_bytes(kind), _texts),
    (is_list, _lists),
    (pt.is_struct, _structs),
    (pt.is_map, _maps),
)


def plain(kind: pa.DataType) -> pa.DataType:
    """A type without dictionaries, views, names of list items and what may not be null, at any depth."""
    if pt.is_dictionary(kind) or pt.is_run_end_encoded(kind):
        return plain(kind.value_type)
    if pt.is_string_view(kind):
        return pa.string()
    if pt.is_binary_view(kind):
        return pa.binary()
    if pt.is_struct(kind):
        return pa.struct([(field.name, plain(field.type)) for field in kind])
    if pt.is_map(kind):
        return pa.map_(plain(kind.key_type), plain(kind.item_type))
    if pt.is_fixed_size_list(kind):
        return pa.list_(plain(kind.value_type), kind.list_size)
    if pt.is_large_list(kind) or pt.is_large_list_view(kind):
        return pa.large_list(plain(kind.value_type))
    return pa.list_(plain(kind.value_type)) if pt.is_list(kind) or pt.is_list_view(kind) else kind


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """Without metadata, and with `plain` types.

    Raises:
        ValueError: if two columns have one name.
    """
    twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two columns are named {twice!r}")
    return pa.schema([(field.name, plain(field.type)) for field in schema])
