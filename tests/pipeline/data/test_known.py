"""What is known of files that have not changed is not read again."""

import json
import os
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sere.pipeline.data.describe import describe_file
from sere.pipeline.data.find import find_sources
from sere.pipeline.data.known import from_json, recall, to_json, to_keep
from sere.pipeline.data.scan import scan_known, unify
from sere.pipeline.data.source import InputSpec, SourceFile
from tests.pipeline.data.opening import open_source


def described(data):
    listing = find_sources(InputSpec(data=str(data), text_column="prompt"))
    return listing, [describe_file(listing, index) for index in range(len(listing.files))]


def described_one(data):
    listing, (file,) = described(data)
    return listing, file


def settle(file):
    os.utime(file, (time.time() - 100, time.time() - 100))


def through_json(file):
    return from_json(json.loads(json.dumps(to_json(file))))


def test_descriptions_of_every_type(tmp_path):
    columns = {
        "prompt": pa.array(["a"]),
        "n": pa.array([2**53 + 1]),
        "d": pa.array([None], pa.decimal256(60, 5)),
        "t": pa.array([1], pa.timestamp("ns", "Europe/Berlin")),
        "l": pa.array([[{"a": -(2**63)}]]),
        "m": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    _, files = described(tmp_path)
    assert through_json(files[0]) == files[0] and files[0].bounds["l.item.a"] == (-(2**63), -(2**63))


names = st.text(max_size=5)


@given(
    name=names,
    rows=st.integers(0, 2**40),
    columns=st.dictionaries(names, st.sampled_from([pa.int64(), pa.list_(pa.string()), pa.struct([("a", pa.float64())])])),
    bounds=st.dictionaries(names, st.tuples(st.integers(), st.integers())),
)
def test_any_description(name, rows, columns, bounds):
    file = SourceFile(name, f"/{name}", rows, "fingerprint", pa.schema(list(columns.items())), bounds, "stamp")
    assert through_json(file) == file


def test_what_is_no_description_is_none(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    good = to_json(described(tmp_path)[1][0])
    assert from_json(good) is not None
    for key in good:
        # An earlier version's has no starts: such a file is read in one piece.
        assert from_json({name: value for name, value in good.items() if name != key}) is None or key == "starts"
        assert from_json(good | {key: [None]}) is None or key in ("name", "path", "fingerprint", "stamp", "int96_unit")
    for values in (None, 1, [], "x", {}, good | {"version": 0}, good | {"schema": "AAAA"}, good | {"bounds": {"a": [1]}}):
        assert from_json(values) is None


def test_only_what_has_not_changed_is_known(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a"}\n')
    assert to_keep(*described_one(file)) is None, "written just now: the next change may have the same time"
    settle(file)
    listing, (before,) = described(file)
    kept = to_keep(listing, before)
    assert recall(listing, listing.files[0], kept) == before
    assert unify(listing, [recall(listing, listing.files[0], kept)]).schema == open_source(file).schema
    read_as_text = find_sources(InputSpec(data=str(file), text_column="prompt", data_format="text"))
    assert recall(read_as_text, listing.files[0], kept) is None
    os.utime(file)
    assert recall(listing, listing.files[0], kept) is None
    file.write_text('{"prompt": "b"}\n')
    settle(file)
    stamp = os.stat(file).st_mtime_ns
    assert recall(listing, listing.files[0], kept) is None and str(stamp) not in kept["stamp"]
    file.unlink()
    assert recall(listing, listing.files[0], kept) is None
    assert recall(listing, listing.files[0], None) is None
    assert recall(listing, SourceFile("b.jsonl", "/b.jsonl"), kept) is None


def test_folders_names_are_found_anew(tmp_path):
    (tmp_path / "split=1").mkdir()
    file = tmp_path / "split=1" / "a.jsonl"
    file.write_text('{"prompt": "a"}\n')
    settle(file)
    listing, (before,) = described(tmp_path)
    assert recall(listing, listing.files[0], to_keep(listing, before)).partition == {"split": "1"}


def test_objects_of_a_store_are_known_by_their_tags(s3_bucket):
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(f"{s3_bucket}/in")
    filesystem.pipe_file(f"{root}/a.jsonl", b'{"prompt": "a"}')
    listing, (before,) = described(f"{s3_bucket}/in/*.jsonl")
    kept = json.loads(json.dumps(to_keep(listing, before)))
    assert recall(listing, listing.files[0], kept) == before
    filesystem.pipe_file(f"{root}/a.jsonl", b'{"prompt": "b"}')
    assert recall(listing, listing.files[0], kept) is None


@pytest.mark.cluster
def test_a_scan_reads_only_what_is_new(tmp_path, monkeypatch):
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        for name in "ab":
            (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "x": 1}) + "\n")
            settle(tmp_path / f"{name}.jsonl")
        spec = InputSpec(data=str(tmp_path), text_column="prompt")
        source, kept = scan_known(spec, known={})
        assert source.num_rows == 2 and set(kept) == {"a.jsonl", "b.jsonl"}
        (tmp_path / "c.jsonl").write_text('{"prompt": "c", "x": 0.5}\n')
        monkeypatch.setattr("sere.pipeline.data.scan.describe_file", _describe_c)
        again, kept_again = scan_known(spec, known=json.loads(json.dumps(kept)))
        assert again.num_rows == 3 and kept_again == kept, "c is too new"
        assert again.files[:2] == source.files and again.schema.field("x").type == pa.float64()
        assert scan_known(spec, num_rows=2, known=kept)[0].schema == source.schema
    finally:
        ray.shutdown()


def _describe_c(source, index):
    assert source.files[index].name == "c.jsonl"
    return describe_file(source, index)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5))
def test_bounds_are_those_of_the_values(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("bounds")
    pq.write_table(pa.table({"x": values}), folder / "a.parquet", row_group_size=2)
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"x": value}) for value in values))
    for suffix in ("parquet", "jsonl"):
        assert described(folder / f"a.{suffix}")[1][0].bounds == {"x": (min(values), max(values))}
