"""Every kind of input, and every row of it once at its place, however it is cut and whatever is wrong with it."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.conf.errors import ConfigError
from tests.examples import examples
from tests.pipeline.data.opening import open_source, prompts, read

ROWS = [{"prompt": f"p{number}", "n": number} for number in range(7)]
LINES = "\n".join(json.dumps(row) for row in ROWS)
EXPECTED = [f"p{number}" for number in range(7)]


@pytest.fixture(params=["parquet", "jsonl", "csv", "tsv", "txt", "jsonl.gz", "jsonl.zst", "saved", "saved splits"])
def data(request, tmp_path):
    file = tmp_path / f"data.{request.param}"
    if request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), file, row_group_size=3)
    elif request.param == "jsonl":
        file.write_text(LINES)
    elif request.param == "jsonl.gz":
        file.write_bytes(gzip.compress(LINES.encode()))
    elif request.param == "jsonl.zst":
        file.write_bytes(pa.compress(LINES.encode(), codec="zstd", asbytes=True))
    elif request.param in ("csv", "tsv"):
        separator = "," if request.param == "csv" else "\t"
        file.write_text("\n".join(f"{a}{separator}{b}" for a, b in [("prompt", "n"), *(tuple(row.values()) for row in ROWS)]))
    elif request.param == "txt":
        file.write_text("\n".join(EXPECTED) + "\n")
    else:
        import datasets

        file = tmp_path / "saved"
        dataset = datasets.Dataset.from_list(ROWS)
        (dataset if request.param == "saved" else datasets.DatasetDict({"train": dataset})).save_to_disk(str(file))
    return file


def test_every_kind(data):
    rows = prompts(data)
    assert [prompt for _, _, prompt, _ in rows] == EXPECTED and [row for _, row, _, _ in rows] == list(range(7))
    assert not any(problem for _, _, _, problem in rows)
    assert len(prompts(data, num_rows=4)) == 4
    source = open_source(data)
    assert source.fingerprints == open_source(data).fingerprints
    assert [row["source_row"] for row in read(source, skip=np.array([0, 3, 6]))] == [1, 2, 4, 5]


def test_any_file_system(data):
    if data.is_dir():
        pytest.skip("datasets reads its own folders")
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe_file(f"/bucket/{data.name}", data.read_bytes())
    assert [prompt for _, _, prompt, _ in prompts(f"memory://bucket/{data.name}")] == EXPECTED
    assert [prompt for _, _, prompt, _ in prompts("memory://bucket")] == EXPECTED
    assert [prompt for _, _, prompt, _ in prompts("memory://bucket/d*")] == EXPECTED
    assert [prompt for _, _, prompt, _ in prompts(f"file://{data}")] == EXPECTED


def test_folders_and_globs(tmp_path):
    for name in ("b/1.jsonl", "a/2.jsonl", "a/_hidden.jsonl", ".x/3.jsonl", "a/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"prompt": name}))
    assert [name for name, *_ in prompts(tmp_path)] == ["a/2.jsonl", "b/1.jsonl"]
    assert [name for name, *_ in prompts(f"{tmp_path}/*/[12].jsonl")] == ["a/2.jsonl", "b/1.jsonl"]
    assert [name for name, *_ in prompts(tmp_path / "a" / "2.jsonl")] == ["2.jsonl"]
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"several or unknown kinds \(\.jsonl, \.txt\): set data_format"):
        open_source(tmp_path)
    assert len(prompts(tmp_path, data_format="text")) == 3


def test_bad_lines_keep_their_place(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "a"}\n{broken\n\n[1]\n{"prompt": 17}\n{"other": 1}\n{"prompt": "\\ud800"}\n')
    rows = prompts(file)
    assert [(row, prompt) for _, row, prompt, _ in rows] == [(0, "a"), (1, None), (2, None), (3, "17"), (4, None), (5, None)]
    problems = [problem for *_, problem in rows]
    no_object = ["line 2 is not a JSON object", "line 4 is not a JSON object"]
    assert problems[:5] == ["", *no_object, "prompt is not text but int", ""]
    assert problems[5] == "line 7 has half of a surrogate pair, which is no text"


def test_types_that_conflict_become_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "x": 1}\n{"prompt": "b", "x": {"y": 2}}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "c", "x": [3], "z": true}\n')
    source = open_source(tmp_path)
    assert source.schema == pa.schema([("prompt", pa.string()), ("x", pa.string()), ("z", pa.bool_())])
    assert [row["x"] for row in read(source, 0)] == ["1", '{"y": 2}'] and read(source, 1)[0]["x"] == "[3]"


def test_bad_csv_lines_keep_their_place(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text('prompt,n\n"a, with\nline",1\nb\nc,3,4\nd,5\n')
    rows = prompts(file)
    assert [prompt for _, _, prompt, _ in rows] == ["a, with\nline", None, None, "d"]
    assert rows[1][3] == "line 4 has 1 fields, the header 2"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=examples(60), deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(["prompt", "a", "b"]), json_values, max_size=3), min_size=1, max_size=12),
    rows_per_table=st.integers(1, 13),
    skip=st.sets(st.integers(0, 11)),
)
def test_any_json_lines(tmp_path_factory, rows, rows_per_table, skip):
    file = tmp_path_factory.mktemp("json") / "x.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in [{"prompt": "text"}, *rows]))
    try:
        source = open_source(file)
    except ConfigError as error:
        assert "not text" in str(error)
        return
    assert source.num_rows == len(rows) + 1
    found = read(source, rows_per_table=rows_per_table, skip=np.array(sorted(skip), np.int64))
    assert [row["source_row"] for row in found] == [place for place in range(len(rows) + 1) if place not in skip]


def test_columns(tmp_path):
    file = tmp_path / "x.parquet"

    def refused(columns, match, **changes):
        pq.write_table(pa.table(columns), file)
        with pytest.raises(ConfigError, match=match):
            open_source(file, **changes)

    good = {"prompt": ["x"], "n": [1]}
    refused(good, r"no column 'text' \(there: prompt, n\): set prompt_column", prompt_column="text")
    refused(good, "no column 'chat'.*set messages_column", messages_column="chat")
    refused(good, r"no column 'who'.*set template \(it uses 'who'\)", template="{{ prompt }} {{ who }}")
    refused(good, "is not a Jinja template", template="{{ prompt")
    refused(good, "no column 's'.*set sampling_column", sampling_column="s")
    refused({"prompt": [1]}, "is int64, not text")
    refused({**good, "finish_reason": ["x"]}, "'finish_reason', which the result would overwrite")
    refused({"prompt": pa.array([], pa.string())}, "has no rows")
    pq.write_table(pa.table({"prompt": pa.array(["x", "x"]).dictionary_encode()}), file)
    assert open_source(file).schema == pa.schema([("prompt", pa.string())])


def test_no_data(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no data at .*nothing.parquet.*give a parquet"):
        open_source(tmp_path / "nothing.parquet")
    with pytest.raises(ConfigError, match="cannot be opened"):
        open_source("nosuch://x/y")
    (tmp_path / "torn.parquet").write_text("PAR1")
    with pytest.raises(ConfigError, match=r"torn.parquet cannot be read"):
        open_source(tmp_path / "torn.parquet")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="no Hugging Face dataset with split 'train'"):
        open_source("nobody/nothing")


def test_secrets_in_uris_are_not_shown(tmp_path):
    with pytest.raises(ConfigError) as error:
        open_source("nosuch://user:hunter2@host/x?sig=abc")
    assert "hunter2" not in str(error.value) and "abc" not in str(error.value)


def test_a_file_that_became_shorter(tmp_path):
    file = tmp_path / "x.txt"
    file.write_text("a\nb\nc\n")
    source = open_source(file)
    file.write_text("a\n")
    with pytest.raises(ConfigError, match=r"x.txt has changed since the job looked at it .it had 3 rows, and now 1"):
        read(source)


def test_bytes_that_are_no_text_spoil_their_row_alone(tmp_path):
    bad = {"data.txt": b"a\n\xff\xfe\nb\n", "data.jsonl": b'{"prompt": "a"}\n{"prompt": "\xff"}\n{"prompt": "b"}\n'}
    bad["data.csv"] = b"prompt\na\n\xff\nb\n"
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        rows = prompts(tmp_path / name)
        assert [prompt for _, _, prompt, _ in rows] == ["a", None, "b"]
        assert [bool(problem) for *_, problem in rows] == [False, True, False] and "is not UTF-8" in rows[1][3]


@pytest.mark.parametrize("name", ["data.txt", "data.jsonl", "data.csv"])
def test_a_byte_order_mark_is_no_content(tmp_path, name):
    lines = {"data.txt": "a", "data.jsonl": '{"prompt": "a"}', "data.csv": "prompt\na"}
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + lines[name].encode())
    assert [prompt for _, _, prompt, _ in prompts(tmp_path / name)] == ["a"]


def test_a_file_in_a_store_is_known_by_its_tag(s3_bucket):
    """Whether it was listed or asked for: else a job could not go on."""
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(f"{s3_bucket}/in")
    filesystem.pipe_file(f"{root}/a.jsonl", LINES.encode())
    filesystem.pipe_file(f"{root}/b.txt", b"")
    one = open_source(f"{s3_bucket}/in/a.jsonl").fingerprints
    filesystem.invalidate_cache()
    assert open_source(f"{s3_bucket}/in/*.jsonl").fingerprints == one
    filesystem.pipe_file(f"{root}/a.jsonl", LINES.replace("p1", "q1").encode())
    filesystem.invalidate_cache()
    assert open_source(f"{s3_bucket}/in/*.jsonl").fingerprints != one


def test_two_columns_of_one_name(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,prompt\na,b\n")
    with pytest.raises(ConfigError, match=r"a.csv cannot be read .two columns are named 'prompt'"):
        open_source(tmp_path / "a.csv")


def test_a_quote_that_is_never_closed_does_not_swallow_the_rows_below(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,n\na,1\n"b,2\nc,3\n')
    with pytest.raises(ConfigError, match=r"a.csv cannot be read .the row of line 3 opens a quote"):
        open_source(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text('prompt,n\na,1\n"b"b,2\n"c\nd",3\n')
    rows = prompts(tmp_path / "a.csv")
    assert [prompt for _, _, prompt, _ in rows] == ["a", None, "c\nd"] and "line 3 is malformed" in rows[1][3]


@pytest.mark.parametrize("text", ['[{"prompt": "a"}]', '[\n{"prompt": "a"}\n]'])
def test_a_json_array_is_told_from_bad_lines(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match="one JSON array"):
        open_source(tmp_path / "a.json")


def test_names_that_look_like_globs(tmp_path):
    (tmp_path / "data[1].JSONL").write_text('{"prompt": "a", "meta": {}}')
    assert [prompt for _, _, prompt, _ in prompts(tmp_path / "data[1].JSONL")] == ["a"]


@pytest.mark.parametrize(("changes", "words"), [({"order_by": ("x",)}, "set order_by"), ({"id_column": "error"}, "id_column")])
def test_columns_that_cannot_be(tmp_path, changes, words):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=words):
        open_source(tmp_path / "a.txt", **changes)
