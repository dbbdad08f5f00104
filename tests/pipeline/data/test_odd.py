"""Odd input: it works, or one line says what is wrong with it and what to do."""

import gzip
import json
import os
import tarfile
import time
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sere.calibration_jobs.texts import read_rows
from sere.conf.errors import ConfigError
from sere.conf.schema import CalibrateConfig, TrackingConfig
from sere.pipeline.data.scan import scan_input
from sere.pipeline.data.source import InputSpec
from tests.pipeline.data.opening import open_source, prompts, read


def refused(data, match, **changes):
    with pytest.raises(ConfigError, match=match) as error:
        source = open_source(data, **changes)
        for index in range(len(source.files)):
            read(source, index)
    assert "\n" not in str(error.value)


def test_a_file_all_of_whose_lines_are_bad(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "b.jsonl").write_text("prompt: a\nprompt: b\n\n[1]\n")
    refused(tmp_path, r"b.jsonl cannot be read .none of its 3 rows can be read: line 1 is not a JSON object")
    (tmp_path / "c.txt").write_bytes("é\nü\n".encode("latin-1"))
    refused(tmp_path / "c.txt", r"c.txt cannot be read .none of its 2 rows can be read: line 1 is not UTF-8")


@pytest.mark.parametrize("indent", [1, 4, "\t"])
def test_indented_json(tmp_path, indent):
    lines = [json.dumps({"prompt": "a", "rows": [{}, {"b": 1}]}, indent=indent), json.dumps({"prompt": "b"}, indent=indent)]
    (tmp_path / "a.json").write_text("\n" + "\n".join(lines))
    refused(tmp_path / "a.json", r"its objects are indented, where one object a line is needed: jq -c \. converts it")


@pytest.mark.parametrize("text", ['\n[{"prompt": "a"},\n{"prompt": "b"}]', '[\n{"prompt": "a"}\n]', ' [ {"prompt": "a"} ]'])
def test_a_json_array(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    refused(tmp_path / "a.json", "it is one JSON array")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.txt", "a.jsonl.gz"])
def test_utf_16(tmp_path, name, encoding):
    texts = ["Öl, und Salz", "naïve 😀"]
    if ".jsonl" in name:
        content = "\r\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in texts)
    else:
        content = "\r\n".join([*([] if name == "a.txt" else ["prompt"]), *(f'"{t}"' if name != "a.txt" else t for t in texts)])
    content = content.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert [prompt for _, _, prompt, _ in prompts(tmp_path / name)] == texts


def test_utf_16_that_is_torn_and_utf_32(tmp_path):
    (tmp_path / "a.txt").write_bytes("one line".encode("utf-16")[:-1])
    refused(tmp_path / "a.txt", r"a.txt cannot be read .*utf-16.* codec can't decode")
    (tmp_path / "a.txt").write_bytes("one line".encode("utf-32"))
    refused(tmp_path / "a.txt", "it is UTF-32: iconv -f UTF-32 -t UTF-8 converts it")


@pytest.fixture
def archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as opened:
        opened.writestr("1.jsonl", '{"prompt": "one"}\n')
        opened.writestr("split=test/2.jsonl", '{"prompt": "two"}\n')
        opened.writestr("notes.md", "no data")
        pq.write_table(pa.table({"prompt": ["three"]}), tmp_path / "3.parquet")
        opened.write(tmp_path / "3.parquet", "3.parquet")
    return tmp_path / "a.zip"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("zip://*.jsonl::{}", ["one"]),
        ("zip://1.jsonl::{}", ["one"]),
        ("zip://**/*.jsonl::{}", ["one", "two"]),
        ("zip://split=test::file://{}", ["two"]),
        ("zip://3.parquet::{}", ["three"]),
        ("zip://*.jsonl::a.zip", ["one"]),
        ("simplecache::zip://*.jsonl::{}", ["one"]),
    ],
)
def test_files_in_an_archive(archive, monkeypatch, path, found):
    monkeypatch.chdir(archive.parent)
    source = open_source(path.format(archive))
    # Workers are elsewhere.
    monkeypatch.chdir("/")
    assert [row["prompt"] for index in range(len(source.files)) for row in read(source, index)] == found
    monkeypatch.chdir(archive.parent)
    assert open_source(path.format(archive)).fingerprints == source.fingerprints


def test_other_chains(tmp_path, archive):
    (tmp_path / "b.jsonl").write_text('{"prompt": "b"}')
    for cache in ("simplecache", "filecache"):
        assert [prompt for _, _, prompt, _ in prompts(f"{cache}::file://{tmp_path}/b.jsonl")] == ["b"]
    with tarfile.open(tmp_path / "a.tar", "w") as opened:
        opened.add(tmp_path / "b.jsonl", "b.jsonl")
    assert [prompt for _, _, prompt, _ in prompts(f"tar://*.jsonl::{tmp_path}/a.tar")] == ["b"]
    import fsspec

    fsspec.filesystem("memory").pipe_file("/chain/a.zip", archive.read_bytes())
    assert [prompt for _, _, prompt, _ in prompts("zip://1.jsonl::memory://chain/a.zip")] == ["one"]


def test_chains_that_cannot_be_opened(tmp_path, archive):
    for data in (f"zip://{archive}", f"zip:///{archive}", "zip://a.zip"):
        refused(
            data, r"cannot be opened \(.*: files in an archive are zip://GLOB::ARCHIVE, such as zip://\*.jsonl::/data/a.zip"
        )
    refused(f"zip://*.jsonl::{tmp_path}/none.zip", r"cannot be opened .*none.zip.*check the path behind each '::'")
    (tmp_path / "torn.zip").write_bytes(archive.read_bytes()[:50])
    refused(f"zip://*.jsonl::{tmp_path}/torn.zip", "cannot be opened .*zip.*check the path")
    refused(f"zip://*.csv::{archive}", "no data at zip://")
    refused(f"nosuch::{archive}", "cannot be opened|no data at")


def test_folders_named_for_what_is_in_them(tmp_path):
    for folder, prompt in [
        ("split=train/day=1", "a"),
        ("split=a%20b/day=20", "b"),
        (f"split={'__HIVE_DEFAULT_PARTITION__'}", "c"),
    ]:
        (tmp_path / "in" / folder).mkdir(parents=True)
        pq.write_table(pa.table({"prompt": [prompt]}), tmp_path / "in" / folder / "part-0.parquet")
    for data in (tmp_path / "in", f"{tmp_path}/in/split=*/**/*.parquet", f"file://{tmp_path}/in"):
        source = open_source(data)
        assert source.schema == pa.schema([("prompt", pa.string()), ("split", pa.string()), ("day", pa.int64())])
        rows = [read(source, index)[0] for index in range(3)]
        found = {row["prompt"]: (row["split"], row["day"]) for row in rows}
        assert found == {"a": ("train", 1), "b": ("a b", 20), "c": (None, None)}
    # What is given rather than found says nothing, nor does a file's own name.
    assert "split" not in open_source(tmp_path / "in" / "split=train" / "day=1").schema.names
    assert open_source(tmp_path / "in" / "split=train").schema.names == ["prompt", "day"]
    (tmp_path / "x=1.jsonl").write_text('{"prompt": "a"}')
    assert open_source(f"{tmp_path}/*.jsonl").schema.names == ["prompt"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt"])
def test_such_folders_of_lines(tmp_path, suffix):
    (tmp_path / "month=01").mkdir()
    content = {"jsonl": '{"prompt": "a"}\nbad\n', "csv": "prompt\na\nb,c\n", "txt": "a\nb"}
    (tmp_path / "month=01" / f"a.{suffix}").write_text(content[suffix])
    rows = read(open_source(tmp_path))
    # A leading zero is no integer's.
    assert [row["month"] for row in rows] == ["01", "01"] and rows[0]["prompt"] == "a"


def test_another_folder_name_is_another_input(tmp_path):
    (tmp_path / "split=a").mkdir()
    (tmp_path / "split=a" / "x.jsonl").write_text('{"prompt": "a"}')
    before = open_source(tmp_path).fingerprints
    (tmp_path / "split=a").rename(tmp_path / "split=b")
    after = open_source(tmp_path).fingerprints
    assert list(after) == list(before) == ["x.jsonl"] and after != before


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_column_that_is_also_a_folder(tmp_path, suffix):
    (tmp_path / "split=train").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "split=train" / "0.jsonl").write_text('{"prompt": "a"}')
    (tmp_path / "b" / "1.jsonl").write_text('{"prompt": "a", "split": "x"}')
    if suffix == "parquet":
        for file in list(tmp_path.rglob("*.jsonl")):
            pq.write_table(pa.Table.from_pylist([json.loads(file.read_text())]), file.with_suffix(".parquet"))
            file.unlink()
    refused(
        tmp_path, rf"b/1.{suffix} has a column 'split', which is also the name of a folder \(split=...\): rename one of them"
    )
    (tmp_path / "split=x" / "split=y").mkdir(parents=True)
    (tmp_path / "split=x" / "split=y" / f"0.{suffix}").write_text("{}")
    refused(tmp_path, "is in two folders that are named for 'split': rename one")


def test_calibration_sees_the_folders_too(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"domain={name}").mkdir()
        (tmp_path / f"domain={name}" / "0.jsonl").write_text('{"text": "x"}\n')
    config = CalibrateConfig(model="m", data=str(tmp_path), output="x", domain_column="domain", tracking=TrackingConfig(uri=""))
    assert [row.domain for row in read_rows(config)[0]] == ["a", "b"]
    (tmp_path / "domain=a" / "0.jsonl").write_text('{"text": "x", "domain": "y"}\n')
    with pytest.raises(ConfigError, match="has a column 'domain', which is also the name of a folder"):
        read_rows(config)


@pytest.mark.parametrize(
    "kind",
    [pa.string_view(), pa.large_string(), pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.large_string())],
)
def test_prompts_of_every_kind_of_text(tmp_path, kind):
    prompt = pa.array(["a", None, "b"], pa.string()).cast(kind)
    nested = pa.array([["x"], [], None], pa.list_(pa.dictionary(pa.int8(), pa.string())))
    views = pa.array([b"\xff", None, b""], pa.binary_view())
    pq.write_table(pa.table({"prompt": prompt, "nested": nested, "views": views}), tmp_path / "a.parquet")
    source = open_source(tmp_path)
    assert [field.type for field in source.schema][1:] == [pa.list_(pa.string()), pa.binary()]
    rows = read(source)
    assert [row["prompt"] for row in rows] == ["a", None, "b"] and [row["views"] for row in rows] == [b"\xff", None, b""]
    assert [row["nested"] for row in rows] == [["x"], [], None]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.jsonl.zst", "a.jsonl.gz"])
def test_empty_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    refused(tmp_path / name, "has no rows")
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf")
    if "." not in name[2:]:
        refused(tmp_path / name, "has no rows")


def test_an_empty_file_among_others(tmp_path):
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "b.csv").write_text("prompt\n")
    (tmp_path / "c.csv").write_text("\n\nprompt\na\n")
    assert [prompt for _, _, prompt, _ in prompts(tmp_path)] == ["a"]
    (tmp_path / "d.parquet").write_text("")
    refused(tmp_path / "d.parquet", "d.parquet cannot be read .*0 bytes.*mend the file, or leave it out of data")


def test_a_header_that_is_not_utf_8(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"prompt,\xff\na,b\n")
    refused(tmp_path / "a.csv", "its header is not UTF-8")


def test_numbers_and_depths_that_no_parser_takes(tmp_path):
    lines = ['{"prompt": "a"}', '{"x": 1e99999999999999999999}', f'{{"x": {"9" * 5000}}}', f'{{"y": {"[" * 300}{"]" * 300}}}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    rows = read(open_source(tmp_path), rows_per_table=9)
    assert [bool(row["sere_problem"]) for row in rows] == [False, True, True, False]
    assert rows[3]["y"] == "[" * 300 + "]" * 300


def settle(file):
    """Make a file look as if it had not been written just now."""
    os.utime(file, (time.time() - 100, time.time() - 100))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_that_is_another_when_it_is_read(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"

    def put(rows):
        if suffix == "jsonl":
            file.write_text("\n".join(map(json.dumps, rows)))
        else:
            pq.write_table(pa.Table.from_pylist(rows), file)

    put([{"prompt": "a", "x": 1}, {"prompt": "b", "x": 2}])
    # Too new to be told by its time.
    source = open_source(tmp_path)
    put([{"prompt": "a", "x": 1.5}, {"prompt": "b", "x": 2.5}])
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"a.{suffix} has changed since the job looked at it .*overwrite=true"):
            read(source)
        put([{"prompt": "a", "y": 1}, {"prompt": "b", "y": 2}])
    put([{"prompt": "a", "x": 1}, {"prompt": "b", "x": 2}])
    settle(file)
    source = open_source(tmp_path)
    os.utime(file)
    assert len(read(source)) == 2, "touched, and the same"
    put([{"prompt": "a", "x": 1}, {"prompt": "c", "x": 2}])
    with pytest.raises(ConfigError, match=r"has changed since the job looked at it .it holds other bytes"):
        read(source)
    file.unlink()
    with pytest.raises(ConfigError, match=r"cannot be read .it is not there"):
        read(source)


def _dies(source, index):
    os._exit(1)


def _fails(source, index):
    raise RuntimeError("one thing\nand another")


@pytest.mark.cluster
def test_what_goes_wrong_in_ray_is_one_line(tmp_path, monkeypatch, local_ray):
    """Neither a traceback of a worker nor Ray's advice about its settings."""
    import fsspec

    def refused_by_ray(data, match):
        with pytest.raises(ConfigError, match=match) as error:
            scan_input(InputSpec(data=str(data), text_column="prompt"))
        assert "\n" not in str(error.value) and "ray::" not in str(error.value)

    fsspec.filesystem("memory").pipe_file("/here/a.jsonl", b'{"prompt": "a"}')
    # In this process's memory, and in no worker's.
    refused_by_ray("memory://here/a.jsonl", r"a.jsonl cannot be read \(it is not there\)")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}')
    assert scan_input(InputSpec(data=str(tmp_path), text_column="prompt")).num_rows == 1
    monkeypatch.setattr("sere.pipeline.data.scan.describe_file", _fails)
    refused_by_ray(tmp_path, r"could not be looked through on the Ray cluster \(RuntimeError: one thing\): check that")
    monkeypatch.setattr("sere.pipeline.data.scan.describe_file", _dies)
    refused_by_ray(tmp_path, r"the Ray cluster lost a worker \(WorkerCrashedError\): run the same command again")
