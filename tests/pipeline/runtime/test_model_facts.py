"""Which model it is: a hub model's commit, found once, and a folder's weights; with and without the hub in reach."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from sere.conf.errors import ConfigError
from sere.ops.model_digest import ModelIdentity, model_digest, model_identity
from sere.pipeline.runtime.model_facts import read_model_facts
from tests.conftest import DEMO_MODEL
from tests.hub_server import Hub, asked_hub

NAME = "somebody/some-moe"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that this process asks, with an empty cache."""
    with asked_hub(monkeypatch, tmp_path / "cache") as started:
        yield started


@pytest.fixture
def go_offline(monkeypatch):
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def other_model(folder: Path) -> Path:
    """The demo model with other weights."""
    shutil.copytree(DEMO_MODEL, folder)
    save_file({"w": torch.ones(3)}, folder / "model.safetensors")
    return folder


def facts_of(model: str | Path = NAME, revision: str | None = None):
    return read_model_facts(str(model), revision=revision, trust_remote_code=False)


def times_asked(hub: Hub) -> int:
    return sum(request.startswith("GET /api/models/") for request in hub.requests)


def test_a_hub_model_is_its_commit_before_and_after_the_download(hub):
    commit = hub.commit(NAME, DEMO_MODEL)
    first = facts_of()
    assert (first.commit, first.digest, first.job_digest) == (commit, None, f"commit:{commit}")
    assert first.top_k == 8 and first.experts_per_layer == 64
    assert times_asked(hub) == 1
    huggingface_hub.snapshot_download(NAME, revision=commit)
    then = facts_of()
    assert then.job_digest == first.job_digest and then.digest == model_digest(DEMO_MODEL)


def test_a_branch_that_moved_is_another_model_and_the_old_commit_is_still_there(hub, tmp_path):
    first = hub.commit(NAME, DEMO_MODEL)
    assert facts_of().commit == first
    second = hub.commit(NAME, other_model(tmp_path / "other"))
    hub.commit(NAME, DEMO_MODEL, ref="v1")
    assert facts_of().commit == second
    assert facts_of(revision=first).commit == first
    assert facts_of(revision="v1").commit not in (first, second)


def test_a_whole_commit_is_not_asked_for(hub):
    commit = hub.commit(NAME, DEMO_MODEL)
    assert facts_of(revision=commit).commit == commit
    assert times_asked(hub) == 0


def test_without_the_hub_the_cache_knows_the_commit(hub, go_offline):
    commit = hub.commit(NAME, DEMO_MODEL)
    hub.commit(NAME, DEMO_MODEL, ref="v2")
    online = facts_of()
    huggingface_hub.snapshot_download(NAME, revision=commit)
    go_offline()
    hub.requests.clear()
    facts = facts_of()
    assert facts.job_digest == online.job_digest and facts.digest == model_digest(DEMO_MODEL)
    assert facts_of(revision=commit).commit == commit
    with pytest.raises(ConfigError, match=rf"^model {NAME} cannot be read .*'v2'.*model_revision.*$"):
        facts_of(revision="v2")
    assert not hub.requests


def test_a_hub_that_is_down_leaves_the_cache(hub, monkeypatch):
    commit = hub.commit(NAME, DEMO_MODEL)
    facts_of()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert facts_of().commit == commit


@pytest.mark.parametrize(
    ("name", "revision", "reason"),
    [
        (NAME, "nope", rf"model {NAME} has no revision 'nope': give a branch, tag or commit of it as model_revision"),
        ("somebody/nothing", None, "model somebody/nothing cannot be read .*RepositoryNotFoundError.*give a model folder"),
        (NAME, "ab" * 20, f"model {NAME} cannot be read .*give a model folder, or a hub name"),
    ],
)
def test_what_is_not_there_is_one_line(hub, name, revision, reason):
    hub.commit(NAME, DEMO_MODEL)
    with pytest.raises(ConfigError, match=reason) as caught:
        facts_of(name, revision)
    assert "\n" not in str(caught.value)


def test_a_half_downloaded_model_has_no_digest(hub, tmp_path):
    """Digests of the files that happened to be there would tell a model from itself."""
    folder = shutil.copytree(DEMO_MODEL, tmp_path / "sharded")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    save_file({"w": torch.ones(3)}, folder / "model-2.safetensors")
    index = '{"weight_map": {"a": "model-1.safetensors", "w": "model-2.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(index)
    commit = hub.commit(NAME, folder)
    for file in ("config.json", "model.safetensors.index.json", "model-1.safetensors"):
        huggingface_hub.hf_hub_download(NAME, file, revision=commit)
    assert facts_of().digest is None
    # Files that nobody loads, here the tokenizer's, may stay away.
    huggingface_hub.snapshot_download(NAME, revision=commit, allow_patterns=["*.safetensors"])
    assert facts_of().digest == model_digest(folder)


def test_a_folder_is_its_files():
    facts = facts_of(DEMO_MODEL)
    assert facts.commit is None and facts.job_digest == facts.digest == model_digest(DEMO_MODEL)
    assert facts.earlier_digests == ()


def test_a_folder_without_safetensors(tmp_path):
    folder = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model .* has no weights \(\*\.safetensors, \*\.bin or \*\.pt files\)"):
        facts_of(folder)
    torch.save({"w": torch.ones(3)}, folder / "pytorch_model.bin")
    one = facts_of(folder)
    torch.save({"w": torch.zeros(3)}, folder / "pytorch_model.bin")
    assert one.digest != facts_of(folder).digest
    assert one.earlier_digests == (None,), "what jobs had when these files were not looked at"


def test_a_revision_of_a_folder_is_refused():
    with pytest.raises(ConfigError, match=f"model {DEMO_MODEL} is a folder, which has no revisions: leave out model_revision"):
        facts_of(DEMO_MODEL, "main")


def test_what_a_job_begun_before_may_have(hub):
    commit = hub.commit(NAME, DEMO_MODEL)
    assert facts_of().earlier_digests == (None,), "nothing was known"
    assert facts_of(revision=commit).earlier_digests == (), "it was of the main branch"
    huggingface_hub.snapshot_download(NAME, revision=commit)
    assert facts_of().earlier_digests == (model_digest(DEMO_MODEL), None)
    assert facts_of(revision=commit).earlier_digests == (model_digest(DEMO_MODEL),)


def test_what_an_engine_knows_of_its_model(hub):
    """vLLM hands on the name and the revision; offline it puts the snapshot's folder in the name's place."""
    commit = hub.commit(NAME, DEMO_MODEL)
    assert model_identity(NAME) == ModelIdentity() and not hub.requests
    assert model_identity(NAME, commit) == ModelIdentity(commit=commit)
    assert model_identity(NAME, huggingface_hub.HfApi().resolve_revision(NAME)) == ModelIdentity(commit=commit)
    folder = huggingface_hub.snapshot_download(NAME)
    whole = ModelIdentity(commit=commit, digest=model_digest(DEMO_MODEL))
    assert model_identity(NAME) == model_identity(NAME, commit) == model_identity(folder, commit) == whole
    assert model_identity(DEMO_MODEL, "main") == model_identity(DEMO_MODEL) == ModelIdentity(digest=whole.digest)


def test_whether_two_are_the_same():
    a, b = ModelIdentity(digest="1" * 64, commit="a" * 40), ModelIdentity(digest="2" * 64, commit="b" * 40)
    assert a.is_same(a) and a.is_same(ModelIdentity(commit=a.commit)) and a.is_same(ModelIdentity(digest=a.digest))
    assert a.is_same(ModelIdentity(digest=a.digest, commit=b.commit)), "another commit, say of the model's card"
    assert a.is_same(b) is False and a.is_same(ModelIdentity(commit=b.commit)) is False
    assert a.is_same(ModelIdentity(digest=b.digest)) is False
    assert ModelIdentity(digest=a.digest).is_same(ModelIdentity(commit=a.commit)) is None
    assert a.is_same(ModelIdentity()) is None
