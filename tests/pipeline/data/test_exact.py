"""No value of the input becomes another one, whatever types its column has in other files and other rows."""

import json
import math
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.conf.errors import ConfigError
from sere.pipeline.data.read import read_file
from sere.pipeline.data.source import PLACE
from tests.examples import examples
from tests.pipeline.data.drawn import BIG, COLUMNS, DOUBLES, INTEGERS, WORDS, meaning, parsed, tuples_as_lists
from tests.pipeline.data.opening import open_source, read


def columns_of(folder, rows_per_table=3):
    """The schema and all rows of a folder of files."""
    source = open_source(folder)
    rows = [row for index in range(len(source.files)) for row in read(source, index, rows_per_table=rows_per_table)]
    return source.schema, rows


def write(folder, *columns, **options):
    for number, column in enumerate(columns):
        prompt = pa.array(["p"] * len(column), pa.string())
        pq.write_table(pa.table({"prompt": prompt, "x": column}), folder / f"{number}.parquet", **options)


def values_of(folder, *columns, **options):
    write(folder, *columns, **options)
    schema, rows = columns_of(folder)
    return schema.field("x").type, [row["x"] for row in rows]


def test_an_id_that_is_float_in_another_file_is_not_rounded(tmp_path):
    kind, values = values_of(tmp_path, pa.array([BIG, None]), pa.array([12.0, 1.5, None, float("nan")]))
    assert kind == pa.string() and values == [str(BIG), None, "12.0", "1.5", None, "NaN"]


@pytest.mark.parametrize("statistics", [True, False])
def test_integers_beside_floats_are_floats_where_all_are_known_to_fit(tmp_path, statistics):
    kind, values = values_of(tmp_path, pa.array([3, None]), pa.array([1.5]), write_statistics=statistics)
    assert (kind, values) == ((pa.float64(), [3.0, None, 1.5]) if statistics else (pa.string(), ["3", None, "1.5"]))


@pytest.mark.parametrize(
    ("one", "other", "kind"),
    [
        (pa.array([2**63], pa.uint64()), pa.array([-1]), pa.string()),
        (pa.array([7], pa.uint64()), pa.array([-1]), pa.int64()),
        (pa.array([2**63], pa.uint64()), pa.array([1]), pa.uint64()),
        (pa.array([2**32 - 1], pa.uint32()), pa.array([-1], pa.int32()), pa.int64()),
        (pa.array([BIG]), pa.nulls(1), pa.int64()),
        (pa.array([BIG]), pa.array([None], pa.float64()), pa.string()),
        (pa.array([None], pa.int64()), pa.array([0.5]), pa.float64()),
        (pa.array([2**31 - 1], pa.int32()), pa.array([0.1], pa.float32()), pa.float64()),
        (pa.array([Decimal("1.10")]), pa.array([0.1]), pa.string()),
        (pa.array([Decimal("1.10")]), pa.array([2**63 - 1]), pa.decimal128(21, 2)),
        (pa.array([Decimal("1.10")]), pa.array([Decimal("12345.678")]), pa.decimal128(8, 3)),
        (pa.array([Decimal("1.10")], pa.decimal128(38, 2)), pa.array([Decimal("0.001")]), pa.decimal256(39, 3)),
        (pa.array([1], pa.timestamp("ms")), pa.array([1], pa.timestamp("ns")), pa.timestamp("ns")),
        (pa.array([253402300799000000], pa.timestamp("us")), pa.array([1], pa.timestamp("ns")), pa.string()),
        (
            pa.array([1], pa.timestamp("us", "Europe/Berlin")),
            pa.array([1], pa.timestamp("us", "UTC")),
            pa.timestamp("us", "UTC"),
        ),
        (pa.array([1], pa.timestamp("us")), pa.array([1], pa.timestamp("us", "UTC")), pa.string()),
        (pa.array(["a"]), pa.array([b"\xff"]), pa.binary()),
        (pa.array([[BIG]]), pa.array([[0.5]]), pa.string()),
        (pa.array([{"a": BIG, "b": 1}]), pa.array([{"a": BIG, "b": 0.5}]), pa.struct([("a", pa.int64()), ("b", pa.float64())])),
        (pa.array([{"a": BIG}]), pa.array([{"a": 0.5}]), pa.string()),
        (pa.array([{"a": BIG}]), pa.array([{"b": 0.5}]), pa.struct([("a", pa.int64()), ("b", pa.float64())])),
        (pa.array([True]), pa.array([1]), pa.string()),
        (pa.array(["1"]).cast(pa.json_()), pa.array(["a"]), pa.string()),
        (pa.array([b"a" * 16], pa.binary(16)).cast(pa.uuid()), pa.array([b"a"]), pa.binary()),
    ],
)
def test_types_of_several_files(tmp_path, one, other, kind):
    for columns in ((one, other), (other, one)):
        write(tmp_path, *columns)
        schema, _ = columns_of(tmp_path)
        check(tmp_path, columns)
        # Fields of structs are in the order of the files.
        found = schema.field("x").type
        assert found == kind or (pa.types.is_struct(kind) and sorted(map(str, found)) == sorted(map(str, kind)))


def test_bytes_beside_numbers_are_refused_by_name(tmp_path):
    match = r"column 'x' is int64 in \S*0.parquet and binary in \S*1.parquet, and no type holds both as they are: convert one"
    with pytest.raises(ConfigError, match=match):
        values_of(tmp_path, pa.array([1]), pa.array([b"a"]))


def check(folder, columns):
    """Every value of the columns of `write` is there, as itself or as text that says the same."""
    source = open_source(folder)

    for index, column in enumerate(columns):
        tables = list(read_file(source, index, rows_per_table=2))
        found = [value for table in tables for value in table["x"].combine_chunks()]
        assert all(table.schema.field("x").type == source.schema.field("x").type for table in tables)
        assert len(found) == len(column)
        for value, wrote in zip(found, column, strict=True):
            assert value.is_valid == wrote.is_valid
            if not wrote.is_valid or meaning(value) == meaning(wrote):
                continue
            kind = wrote.type
            if pa.types.is_binary(value.type) or pa.types.is_large_binary(value.type):
                assert value.as_py() == wrote.as_py().encode()
            elif pa.types.is_duration(kind):
                assert value.as_py() == f"{wrote.value} {kind.unit}"
            elif pa.types.is_temporal(kind):
                assert value.as_py() == wrote.cast(pa.string()).as_py()
            else:
                assert pa.types.is_string(value.type) or pa.types.is_large_string(value.type)
                assert not isinstance(wrote.as_py(), str), "text is text already"
                assert parsed(json.loads(value.as_py(), parse_float=Decimal)) == tuples_as_lists(meaning(wrote, is_text=True))


def wide(text):
    """A number that is written as a double's text is that double."""
    return float(text) if repr(float(text)) == text else Decimal(text)


@settings(max_examples=examples(300), deadline=None)
@given(
    drawn=st.lists(COLUMNS, min_size=1, max_size=4),
    options=st.fixed_dictionaries({"write_statistics": st.booleans(), "row_group_size": st.sampled_from([1, 2, 100])}),
)
def test_columns_of_parquet_files(tmp_path_factory, drawn, options):
    folder = tmp_path_factory.mktemp("parquet")
    columns = [pa.array(values, kind) for kind, values in drawn]
    write(folder, *columns, **options)
    try:
        check(folder, columns)
    except ConfigError as error:
        kinds = {str(kind) for kind, _ in drawn}
        assert "column 'x' is" in str(error) and any("binary" in kind for kind in kinds) and len(kinds) > 1


class Written(str):
    """A number as it stands in a JSON file."""


numbers = st.one_of(
    st.integers().map(str),
    INTEGERS.map(str),
    DOUBLES.map(json.dumps),
    st.decimals(allow_nan=False, allow_infinity=False, places=3).map(str),
    st.from_regex(r"-?(0|[1-9][0-9]{0,20})\.[0-9]{1,25}([eE][+-]?[0-9]{1,3})?", fullmatch=True, alphabet="0123456789.-+eE"),
).map(Written)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=3),
    max_leaves=5,
)
same_kind = st.one_of(
    *(st.lists(kind, min_size=1, max_size=4) for kind in (numbers, st.lists(numbers, max_size=2), json_values))
)


def as_json(value):
    if isinstance(value, Written):
        return str(value)
    if isinstance(value, list):
        return f"[{', '.join(map(as_json, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)}: {as_json(item)}" for name, item in value.items()) + "}"
    return json.dumps(value)


def same(found, wrote):
    """Whether a value of the table, or of JSON text in it, is what was written."""
    if isinstance(wrote, Written):
        if isinstance(found, float):
            if not math.isfinite(found):
                return str(wrote) == json.dumps(found)
            exact = Decimal(str(wrote))
            return exact in (Decimal(repr(found)), Decimal(f"{found:.16e}"))
        return not isinstance(found, bool | str) and Decimal(found) == Decimal(str(wrote))
    if isinstance(wrote, list):
        return isinstance(found, list) and len(found) == len(wrote) and all(map(same, found, wrote))
    if isinstance(wrote, dict):
        return isinstance(found, dict) and all(same(found.get(name), wrote.get(name)) for name in {*found, *wrote})
    return type(found) is type(wrote) and found == wrote


def test_numbers_of_json_that_no_double_holds(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "a", "x": 9007199254740993, "y": 1, "z": 1e400}\n{"x": 1.5, "y": 1.5, "z": 2}'
    )
    (tmp_path / "b.jsonl").write_text('{"prompt": "b", "x": 18446744073709551616, "z": 0.1000000000000000055511151231257827}')
    (tmp_path / "c.jsonl").write_text('{"prompt": "c", "x": true, "y": 0.10000000000000001, "z": {"y": 1.2345678901234567891}}')
    schema, rows = columns_of(tmp_path)
    assert [schema.field(name).type for name in "xyz"] == [pa.string(), pa.float64(), pa.string()]
    assert [row["x"] for row in rows] == ["9007199254740993", "1.5", "18446744073709551616", "true"]
    assert [row["y"] for row in rows] == [1.0, 1.5, None, 0.1]
    assert [row["z"] for row in rows] == [
        "1E+400",
        "2",
        "0.1000000000000000055511151231257827",
        '{"y": 1.2345678901234567891}',
    ]


def test_true_is_no_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "x": 1.5}\n{"prompt": "a", "x": true}')
    assert [row["x"] for row in columns_of(tmp_path)[1]] == ["1.5", "true"]


@settings(max_examples=examples(300), deadline=None)
@given(files=st.lists(same_kind, min_size=1, max_size=3), rows_per_table=st.integers(1, 5))
def test_columns_of_json_files(tmp_path_factory, files, rows_per_table):
    folder = tmp_path_factory.mktemp("json")
    for number_, values in enumerate(files):
        lines = [f'{{"prompt": "p", "x": {as_json(value)}}}' for value in values]
        (folder / f"{number_}.jsonl").write_text("\n".join(lines))
    schema, rows = columns_of(folder, rows_per_table)
    wrote = [value for values in files for value in values]
    for row, value in zip(rows, wrote, strict=True):
        found = row["x"]
        if schema.field("x").type == pa.string() and value is not None and not (type(value) is str and found == value):
            found = json.loads(found, parse_float=wide)
        assert same(found, value), (found, value, schema)


def test_the_schema_does_not_depend_on_how_a_file_is_cut(tmp_path, monkeypatch):
    lines = [{"prompt": "p", "x": 1, "m": {}}, {"x": 0.5, "m": {"a": 1}}, {"x": BIG}, {"x": None, "l": []}, {"l": [{"a": 1}]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    schemas = []
    for number_ in (1, 2, 3, 100):
        monkeypatch.setattr("sere.pipeline.data.describe._SCAN_ROWS", number_)
        schemas.append(open_source(tmp_path).schema)
    assert all(schema == schemas[0] for schema in schemas)
    assert schemas[0].field("x").type == pa.string() and schemas[0].field("m").type == pa.struct([("a", pa.int64())])


def test_files_that_give_no_row_have_no_say_in_the_schema(tmp_path):
    """Else a file that comes later, and changes nothing, would give the rest of a job's parts another schema."""
    write(tmp_path, pa.array([BIG]))
    before = open_source(tmp_path, num_rows=1).schema
    write(tmp_path, pa.array([BIG]), pa.array([], pa.float64()), pa.array([0.5]))
    assert open_source(tmp_path, num_rows=1).schema == before
    assert set(before.names).isdisjoint(PLACE.names)


def test_a_column_that_becomes_text_is_said(tmp_path, caplog):
    write(tmp_path, pa.array([BIG]), pa.array([0.5]))
    open_source(tmp_path)
    assert "column 'x' is int64 in" in caplog.text and "it is text in the results" in caplog.text


def test_what_is_only_text_is_not_beside_bytes_in_a_third_file(tmp_path):
    with pytest.raises(ConfigError, match=r"column 'x' is int64 in \S*1.parquet and binary in \S*2.parquet, and no type"):
        values_of(tmp_path, pa.array(["a"]), pa.array([1]), pa.array([b"a"]))


@pytest.mark.parametrize("nested", [False, True])
def test_timestamps_of_96_bits_that_no_nanosecond_is(tmp_path, nested):
    """As Spark and Hive write them; the year 9999 for "never" is common."""
    never, odd = 253402300799000000, 1_001

    def put(values, unit, number_=0):
        column = pa.array([None, *values], pa.timestamp(unit))
        column = pa.array([{"a": value} for value in column], pa.struct([("a", column.type)])) if nested else column
        prompt = pa.array(["p"] * len(column))
        file = tmp_path / f"{number_}.parquet"
        pq.write_table(pa.table({"prompt": prompt, "x": column}), file, use_deprecated_int96_timestamps=True, row_group_size=2)

    def found():
        source = open_source(tmp_path)
        tables = [table for index in range(len(source.files)) for table in read_file(source, index, rows_per_table=2)]
        rows = [row for table in tables for row in table["x"]]
        kind = source.schema.field("x").type
        values = [row["a"] if nested and row.is_valid and pa.types.is_struct(kind) else row for row in rows]
        return kind.field("a").type if pa.types.is_struct(kind) else kind, values

    put([never, 1], "us")
    kind, values = found()
    assert kind == pa.timestamp("us") and [value.value for value in values if value.is_valid] == [never, 1]
    put([odd, 1], "ns")
    kind, values = found()
    assert kind == pa.timestamp("ns") and [value.value for value in values if value.is_valid] == [odd, 1]
    put([never, odd], "us")
    assert [value.value for value in found()[1] if value.is_valid] == [never, odd]
    put([odd], "ns")
    put([never], "us", 1)
    kind, values = found()
    texts = [value.as_py() for value in values if value.is_valid]
    assert kind == pa.string() and all(word in str(texts) for word in ("1970-01-01 00:00:00.000001001", "9999-12-31 23:59:59"))
