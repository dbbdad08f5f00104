"""Reading text: usable rows, remarks on the others, and errors."""

import csv
import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from sere.calibration_jobs.shards import TokenRow, make_plan, tokenize
from sere.calibration_jobs.texts import read_rows
from sere.conf.errors import ConfigError
from sere.conf.schema import CalibrateConfig, JudgeConfig, TrackingConfig

TEXTS = ["zero", None, "two", "", "  ", "five", "six"]
OFF = JudgeConfig(held_out_rows=0)


def config(data, **changes):
    values = {"model": "m", "data": str(data), "output": "x/similarity.safetensors", "judge": OFF, "sequence_length": 4}
    return CalibrateConfig(**{**values, "tracking": TrackingConfig(uri=""), **changes})


@pytest.fixture(params=["parquet", "jsonl", "jsonl.gz", "csv", "saved"])
def data(request, tmp_path):
    file = tmp_path / f"d.{request.param}"
    rows = [{"text": text, "kind": "ab"[i % 2]} for i, text in enumerate(TEXTS)]
    if request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif request.param == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(file))
    elif request.param == "csv":
        # CSV knows no null.
        lines = [["text", "kind"], *([row["text"] or "", row["kind"]] for row in rows)]
        with file.open("w", newline="") as opened:
            csv.writer(opened).writerows(lines)
    else:
        lines = "\n".join(json.dumps(row) for row in rows).encode()
        file.write_bytes(gzip.compress(lines) if request.param == "jsonl.gz" else lines)
    return file


def test_usable_rows_in_order_and_remarks_on_the_others(data):
    rows, remarks = read_rows(config(data))
    assert [(row.number, row.text) for row in rows] == [(0, "zero"), (2, "two"), (5, "five"), (6, "six")]
    first = "empty" if data.suffix == ".csv" else "null"
    assert [(r.number, r.remark) for r in remarks] == [(1, f"skipped: {first}"), (3, "skipped: empty"), (4, "skipped: empty")]
    assert {remark.file for remark in remarks} == {str(data)}
    first, remarks = read_rows(config(data, num_sequences=2))
    assert [row.text for row in first] == ["zero", "two"] and len(remarks) == 1, "num_sequences counts usable rows"
    assert [row.domain for row in read_rows(config(data, domain_column="kind"))[0]] == ["a", "a", "b", "a"]


def test_rows_that_are_not_text(tmp_path):
    file = tmp_path / "mixed.jsonl"
    file.write_text('{"text": "a"}\n{"text": 3}\nnot json\n[1]\n{"other": "x"}\n{"text": ["a"]}\n{"text": "b"}\n')
    rows, remarks = read_rows(config(file))
    assert [row.text for row in rows] == ["a", "b"]
    assert [remark.remark.removeprefix("skipped: ") for remark in remarks] == [
        "text is not text but int",
        "line 3 is not a JSON object",
        "line 4 is not a JSON object",
        "null",
        "text is not text but list",
    ]
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(ConfigError, match="no usable text in 'text': all 2 rows are unusable, the first is skipped: not text"):
        read_rows(config(tmp_path / "numbers.parquet"))


def test_input_errors(tmp_path):
    with pytest.raises(ConfigError, match="no data at"):
        read_rows(config(tmp_path / "none.parquet"))
    (tmp_path / "a.bin").write_text("x")
    with pytest.raises(ConfigError, match="several or unknown kinds"):
        read_rows(config(tmp_path / "a.bin"))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "one.parquet")
    with pytest.raises(ConfigError, match=r"no column 'body' \(there: text\)"):
        read_rows(config(tmp_path / "one.parquet", text_column="body"))
    with pytest.raises(ConfigError, match=r"one\.parquet has no column 'kind' .*set domain_column"):
        read_rows(config(tmp_path / "one.parquet", domain_column="kind"))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    with pytest.raises(ConfigError, match=r"empty or damaged|no usable text"):
        read_rows(config(tmp_path / "empty.parquet"))
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(ConfigError, match=r"bad\.parquet cannot be read"):
        read_rows(config(tmp_path / "bad.parquet"))
    (tmp_path / "bad.jsonl").write_text("{not json")
    with pytest.raises(ConfigError, match="no usable text"):
        read_rows(config(tmp_path / "bad.jsonl"))


def test_long_rows_are_cut_and_said_so(data, demo_model):
    rows, _ = read_rows(config(data))
    tokens, remarks = tokenize(config(data, sequence_length=4), AutoTokenizer.from_pretrained(demo_model), rows)
    assert [len(row.tokens) for row in tokens] == [4, 3, 4, 3]
    assert remarks == []
    file = data.with_name("long.jsonl")
    file.write_text('{"text": "abcdefgh"}\n')
    rows, _ = read_rows(config(file))
    ((row,), (remark,)) = tokenize(config(file), AutoTokenizer.from_pretrained(demo_model), rows)
    assert len(row.tokens) == 4 and remark.remark == "cut: 8 tokens, of which the first 4 are used" and remark.number == 0


def rows_of(domains: str) -> list[TokenRow]:
    return [TokenRow((number, number + 1), domain) for number, domain in enumerate(domains)]


def planned(domains: str, **changes):
    judge = JudgeConfig(
        held_out_rows=changes.pop("held_out_rows", 0), batch_sizes=(1,), reference_batch_size=1, emulate_batch_sizes=()
    )
    return make_plan(config("d", judge=judge, **{"shard_rows": 2, **changes}), rows_of(domains))


def test_every_row_has_one_place():
    plan = planned("aabbbaabbbaaaaacc", held_out_rows=5)
    placed = [row for shard in plan.shards for row in shard.rows] + list(plan.held_out)
    assert sorted(placed, key=lambda row: row.tokens) == rows_of("aabbbaabbbaaaaacc")
    assert len(plan.held_out) == 5 and {row.domain for row in plan.held_out} >= {"a", "b"}
    assert all(1 <= len(shard.rows) <= 2 for shard in plan.shards) and plan.domains == ("a", "b", "c")
    assert [shard.index for shard in plan.shards] == list(range(len(plan.shards)))
    assert plan.num_calibration_rows == 12


def test_shards_are_samples_of_all_the_data_in_two_halves():
    plan = planned("a" * 50 + "b" * 50, shard_rows=25)
    assert [shard.half for shard in plan.shards] == [0, 1, 0, 1]
    assert all(8 <= sum(row.domain == "a" for row in shard.rows) <= 17 for shard in plan.shards)
    assert len(planned("aaaa", shard_rows=100).shards) == 2, "small data still has two halves"


def test_plan_depends_on_content_and_order():
    assert planned("aabb").digest == planned("aabb").digest
    assert len({planned(domains).digest for domains in ("aabb", "abab", "aab")}) == 3


def test_holding_out_everything_is_refused():
    with pytest.raises(ConfigError, match=r"has 3 usable rows, of which judge\.held_out_rows=3 leaves none"):
        planned("aaa", held_out_rows=3)


def test_too_many_domains_are_refused_and_uncalibrated_ones_left_out():
    with pytest.raises(ConfigError, match=r"has 20 values, at most 16 domains are compared"):
        planned("abcdefghijklmnopqrst")
    plan = planned("aaaab", held_out_rows=3)
    assert set(plan.domains) == {row.domain for shard in plan.shards for row in shard.rows}


def test_file_names_are_not_patterns(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a[1].parquet")
    assert [row.text for row in read_rows(config(tmp_path))[0]] == ["a"]


def test_texts_in_an_object_store(uri_of_texts):
    rows, remarks = read_rows(config(uri_of_texts))
    assert [row.text for row in rows] == ["one", "two"] and not remarks


@pytest.fixture(params=["memory", "s3"])
def uri_of_texts(request):
    """A JSONL file that only fsspec reaches."""
    import fsspec

    uri = f"{request.getfixturevalue('s3_bucket')}/texts.jsonl" if request.param == "s3" else "memory://bucket/texts.jsonl"
    with fsspec.open(uri, "w") as opened:
        opened.write('{"text": "one"}\n{"text": "two"}\n')
    return uri
