"""Drawn columns of every type that Arrow has, and what their values say whatever type says it."""

import math
from decimal import Decimal
from fractions import Fraction

import pyarrow as pa
from hypothesis import strategies as st

BIG = 2**53 + 1
INTEGERS = st.sampled_from([0, 1, -1, 127, 2**31, 2**53, BIG, -BIG, 2**63 - 1, -(2**63), 2**63, 2**64 - 1]) | st.integers(-9, 9)


def of(kind, values):
    return st.tuples(st.just(kind), st.lists(st.none() | values, min_size=1, max_size=4))


def decimals(precision, scale):
    most = 10**precision - 1
    return of(
        pa.decimal128(precision, scale) if precision <= 38 else pa.decimal256(precision, scale),
        (st.integers(-most, most) | st.sampled_from([most, -most, 1])).map(lambda n: Decimal(f"{n}e-{scale}")),
    )


def integers(kind):
    low = -(2 ** (kind.bit_width - 1)) if pa.types.is_signed_integer(kind) else 0
    return of(kind, INTEGERS.filter(lambda n: low <= n < low + 2**kind.bit_width))


# Up to the year 9999, which no nanosecond of 64 bits is in.
INSTANTS = st.integers(-(10**10), 2 * 10**11)
LONG = st.sampled_from([1, -5, BIG, 2**63 - 1])
DOUBLES = st.floats() | st.sampled_from([0.1, 12.0, 2.0**53, 1e300])
WORDS = st.text(max_size=3)
COLUMNS = st.one_of(
    *(integers(kind()) for kind in (pa.int8, pa.uint8, pa.int16, pa.int32, pa.uint32, pa.int64, pa.int64, pa.int64, pa.uint64)),
    of(pa.float64(), DOUBLES),
    of(pa.float64(), DOUBLES),
    of(pa.float32(), st.floats(width=32)),
    of(pa.float16(), st.floats(width=16)),
    *(decimals(*sizes) for sizes in ((4, 2), (20, 0), (38, 10), (38, 38), (60, 5))),
    of(pa.bool_(), st.booleans()),
    *(of(kind, WORDS) for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()))),
    *(of(kind, st.binary(max_size=3)) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
    of(pa.binary(2), st.binary(min_size=2, max_size=2)),
    *(of(pa.timestamp("ms", zone), INSTANTS) for zone in (None, "UTC", "Europe/Berlin")),
    *(of(pa.timestamp(unit, zone), INSTANTS.map(lambda n: n * 999)) for unit in ("us", "ns") for zone in (None, "UTC")),
    of(pa.date32(), st.integers(-9999, 99999)),
    of(pa.time32("ms"), st.integers(0, 86_399_999)),
    of(pa.time64("ns"), st.integers(0, 86_399_999_999_999)),
    *(of(pa.duration(unit), LONG) for unit in ("s", "us", "ns")),
    of(pa.list_(pa.int64()), st.lists(LONG | st.none(), max_size=3)),
    of(pa.list_(pa.float64()), st.lists(DOUBLES, max_size=3)),
    of(pa.large_list(pa.string()), st.lists(WORDS, max_size=3)),
    # Without nulls: Arrow does not read them.
    st.tuples(st.just(pa.list_(pa.int64(), 2)), st.lists(st.lists(LONG, min_size=2, max_size=2), min_size=1)),
    of(pa.struct([("a", pa.int64()), ("b", pa.string())]), st.fixed_dictionaries({"a": LONG, "b": WORDS})),
    of(
        pa.struct([("a", pa.float64()), ("c", pa.list_(pa.int64()))]),
        st.fixed_dictionaries({"a": DOUBLES, "c": st.just([1])}),
    ),
    of(pa.list_(pa.struct([("a", pa.int64())])), st.lists(st.fixed_dictionaries({"a": LONG}), max_size=2)),
    of(pa.list_(pa.struct([("a", pa.float64())])), st.lists(st.fixed_dictionaries({"a": DOUBLES}), max_size=2)),
    of(pa.struct([("a", pa.decimal128(10, 2))]), st.fixed_dictionaries({"a": st.just(Decimal("1.10"))})),
    of(pa.map_(pa.string(), pa.int64()), st.lists(st.tuples(WORDS, LONG), max_size=2)),
    of(pa.map_(pa.string(), pa.float64()), st.lists(st.tuples(WORDS, DOUBLES), max_size=2)),
    of(pa.null(), st.none()),
)
NS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


def number(value, is_text=False):
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return Fraction(repr(value) if is_text and isinstance(value, float) else value)


def meaning(value, is_text=False):
    """What an Arrow scalar says, whatever type says it; or what its text does, where a float is the shortest that gives it."""
    kind = value.type
    if isinstance(value, pa.ExtensionScalar | pa.DictionaryScalar):
        return meaning(value.value, is_text) if value.is_valid else None
    if not value.is_valid:
        return None
    if pa.types.is_map(kind):
        return [(meaning(item["key"], is_text), meaning(item["value"], is_text)) for item in value.values]
    if pa.types.is_struct(kind):
        return {name: found for name in value if (found := meaning(value[name], is_text)) is not None}
    if pa.types.is_nested(kind):
        return [meaning(item, is_text) for item in value.values]
    if pa.types.is_timestamp(kind) or pa.types.is_duration(kind):
        return str(kind)[:4], value.value * NS[kind.unit], getattr(kind, "tz", None) is None
    if pa.types.is_time(kind):
        return "time", value.value * NS[kind.unit]
    found = value.as_py()
    if isinstance(found, str):
        return found
    return number(found, is_text) if isinstance(found, float | Decimal | int) and not isinstance(found, bool) else found


def parsed(value):
    """What JSON text says, with numbers as exact as they are written."""
    if isinstance(value, list):
        return [parsed(item) for item in value]
    if isinstance(value, dict):
        return {name: parsed(item) for name, item in value.items() if item is not None}
    return value if value is None or isinstance(value, str | bool) else number(value)


def tuples_as_lists(value):
    if isinstance(value, list | tuple) and not (isinstance(value, tuple) and len(value) == 3):
        return [tuples_as_lists(item) for item in value]
    return {name: tuples_as_lists(item) for name, item in value.items()} if isinstance(value, dict) else value
