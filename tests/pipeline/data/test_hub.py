"""Datasets of the hub: every reader gets the commit that the revision was when the job began; with and without the hub."""

import json
from dataclasses import replace

import datasets
import pytest
from huggingface_hub import constants

from sere.calibration_jobs.texts import read_rows
from sere.conf.errors import ConfigError
from sere.conf.schema import CalibrateConfig
from sere.pipeline.data.hub import load_dataset
from tests.hub_server import asked_hub
from tests.pipeline.data.opening import open_source, read

NAME = "somebody/prompts"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that this process asks, with empty caches; `hub.put(prompts, ref)` makes a commit of a dataset."""
    with asked_hub(monkeypatch, tmp_path / "hub") as started:
        for name, value in {
            "HF_ENDPOINT": started.address,
            "HF_DATASETS_CACHE": tmp_path / "datasets",
            "HF_HUB_OFFLINE": False,
            "USE_PARQUET_EXPORT": False,
        }.items():
            monkeypatch.setattr(datasets.config, name, value)
        monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "downloads")

        def put(*prompts, ref="main"):
            folder = tmp_path / f"commit-{len(list(tmp_path.glob('commit-*')))}"
            folder.mkdir()
            (folder / "train.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
            return started.commit(f"datasets/{NAME}", folder, ref=ref)

        started.put = put
        yield started


@pytest.fixture
def go_offline(monkeypatch):
    def go():
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    return go


def prompts_of(source):
    return [row["prompt"] for row in read(source)]


def test_readers_get_the_commit_whatever_becomes_of_the_branch(hub):
    first = hub.put("a", "b")
    source = open_source(NAME)
    assert source.commit == source.spec.data_revision == first
    second = hub.put("c", "d")
    hub.requests.clear()
    assert prompts_of(source) == ["a", "b"]
    assert hub.requests and not [request for request in hub.requests if "main" in request], "asked for once"
    moved = open_source(NAME)
    assert moved.commit == second and prompts_of(moved) == ["c", "d"]
    again = open_source(NAME, data_revision=first)
    assert again.fingerprints == source.fingerprints and prompts_of(again) == ["a", "b"]
    assert f"commit={first}" in source.fingerprints["train"] and f"commit={second}" in moved.fingerprints["train"]


def test_what_jobs_noted_before_there_were_commits(hub):
    """The rows' number and a fingerprint that the commit determines, however it was named."""
    commit = hub.put("a", "b")
    hub.put("c", ref="v2")
    dataset = datasets.load_dataset(NAME, split="train")
    source = open_source(NAME)
    assert source.earlier_fingerprints == {"train": f"2 rows, {dataset._fingerprint}"}
    assert open_source(NAME, data_revision=commit).earlier_fingerprints == source.earlier_fingerprints
    assert open_source(NAME, data_revision="v2").earlier_fingerprints != source.earlier_fingerprints


def test_without_the_hub_the_cache_has_the_rows(hub, go_offline):
    commit = hub.put("a", "b")
    online = open_source(NAME)
    go_offline()
    hub.requests.clear()
    offline = open_source(NAME)
    assert offline.commit == commit and offline.fingerprints == online.fingerprints
    assert prompts_of(offline) == ["a", "b"] and not hub.requests


def test_a_hub_that_is_down_leaves_the_cache(hub, monkeypatch):
    commit = hub.put("a", "b")
    online = open_source(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:1")
    assert open_source(NAME).fingerprints == online.fingerprints and prompts_of(online) == ["a", "b"]
    assert open_source(NAME).commit == commit


def test_the_cache_passes_for_no_other_commit(hub, go_offline):
    """Without the hub the datasets package takes what was cached last, whatever it was asked for."""
    first = hub.put("a")
    source = open_source(NAME)
    second = hub.put("b")
    open_source(NAME)
    go_offline()
    for ask in (lambda: open_source(NAME, data_revision=first), lambda: load_dataset(source.spec), lambda: prompts_of(source)):
        with pytest.raises(ConfigError, match=f"hub does not answer, and .* the local cache .* {second}.*data_revision"):
            ask()
    assert open_source(NAME, data_revision=second).commit == second


@pytest.mark.parametrize(("name", "revision"), [(NAME, "nope"), (NAME, "ab" * 20), ("somebody/nothing", None)])
def test_what_is_not_there_is_one_line(hub, name, revision):
    hub.put("a")
    with pytest.raises(
        ConfigError, match=f"^data {name} is no file here, and no Hugging Face dataset .*data_revision$"
    ) as caught:
        open_source(name, data_revision=revision)
    assert "\n" not in str(caught.value)


def test_folders_have_no_commit(tmp_path):
    dataset = datasets.Dataset.from_dict({"prompt": ["a", "b"]})
    dataset.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text('{"prompt": "a"}')
    saved, files = open_source(tmp_path / "saved"), open_source(tmp_path / "files", data_format="huggingface")
    for source in (saved, files):
        assert source.commit is None and source.spec.data_revision is None and source.earlier_fingerprints == {}
        assert "commit" not in source.fingerprints["train"]
    assert (prompts_of(saved), prompts_of(files)) == (["a", "b"], ["a"])


def test_calibration_text(hub):
    first = hub.put("a", "b")
    config = CalibrateConfig(model="m", data=NAME, output="o", text_column="prompt")
    assert [row.text for row in read_rows(config)[0]] == ["a", "b"]
    hub.put("c")
    assert [row.text for row in read_rows(config)[0]] == ["c"]
    assert [row.text for row in read_rows(replace(config, data_revision=first))[0]] == ["a", "b"]
