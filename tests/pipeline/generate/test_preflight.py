"""What is settled before engines start, of a hub model: which commit they are told, and whether an artifact is of it."""

import dataclasses
from typing import Any

import pytest

from sere.conf.errors import ConfigError
from sere.conf.schema import EngineConfig, GenerateConfig, RerouteConfig
from sere.ops.similarity import SimilarityArtifact
from sere.pipeline.data.source import InputSpec, Source, SourceFile
from sere.pipeline.generate import driver
from sere.pipeline.generate.identity import BATCHING, conditions, earlier_settings, free_settings, job_settings, kind_of
from sere.pipeline.generate.preflight import engine_arguments, prepare_reroute
from sere.pipeline.generate.record import Session
from sere.pipeline.runtime.job_folder import JobFolder
from sere.pipeline.runtime.model_facts import ModelFacts, read_model_facts
from sere.pipeline.runtime.storage import Storage
from tests.conftest import DEMO_MODEL

COMMIT, OTHER = "a" * 40, "b" * 40


def config_of(commit: str | None = COMMIT, *, reroute: RerouteConfig | None = None, **engine_kwargs: Any) -> GenerateConfig:
    engine = EngineConfig(engine_kwargs=engine_kwargs)
    return GenerateConfig(model="org/moe", model_revision=commit, data="d", output="o", engine=engine, reroute=reroute)


def arguments(config: GenerateConfig) -> dict[str, Any]:
    return engine_arguments(config, None, on_gpu=False)


def test_engines_are_told_the_commit():
    made = arguments(config_of())
    assert (made["revision"], made["tokenizer_revision"]) == (COMMIT, COMMIT)
    assert not {"revision", "tokenizer_revision"} & set(arguments(config_of(None)))


def test_the_commit_is_not_looked_for_in_another_tokenizers_repository():
    made = arguments(config_of(tokenizer="org/other"))
    assert (made["revision"], made["tokenizer_revision"]) == (COMMIT, "main")
    assert arguments(config_of(tokenizer="org/other", tokenizer_revision="v2"))["tokenizer_revision"] == "v2"
    assert arguments(config_of(tokenizer="org/moe"))["tokenizer_revision"] == COMMIT


@pytest.mark.parametrize("key", ["revision", "tokenizer_revision"])
def test_engine_kwargs_that_name_another_revision_are_refused(key):
    with pytest.raises(ConfigError, match=rf"engine\.engine_kwargs\.{key}=v2 is not the model's commit .*model_revision=v2"):
        arguments(config_of(**{key: "v2"}))
    for same in (COMMIT, None):
        assert arguments(config_of(**{key: same}))[key] == COMMIT
    assert arguments(config_of(None, **{key: "v2"}))[key] == "v2", "a folder has none: as it was given"


def facts_of(**changes: Any) -> ModelFacts:
    facts = read_model_facts(str(DEMO_MODEL), revision=None, trust_remote_code=False)
    return dataclasses.replace(facts, name="org/moe", **changes)


@pytest.fixture
def check(demo_artifact, tmp_path):
    """Checks the artifact of a model (its entry in the manifest) against facts."""

    def checked(model: dict[str, Any], facts: ModelFacts) -> None:
        whole = SimilarityArtifact.load(demo_artifact)
        file = SimilarityArtifact(whole.matrices, {**whole.manifest, "model": model}).save(tmp_path / "similarity.safetensors")
        reroute = RerouteConfig(policy="sere", similarity=str(file))
        prepare_reroute(config_of(reroute=reroute), facts, tmp_path)

    return checked


def test_an_artifact_of_the_commit_passes_before_the_download(check):
    check({"name": "org/moe", "digest": "1" * 64, "commit": COMMIT}, facts_of(commit=COMMIT, digest=None))


def test_an_artifact_of_another_commit_is_refused_before_the_download(check):
    with pytest.raises(ConfigError, match=f"other weights .*model_revision={OTHER}"):
        check({"name": "org/moe", "digest": "1" * 64, "commit": OTHER}, facts_of(commit=COMMIT, digest=None))


def test_an_artifact_that_knows_files_only_is_left_to_the_engines_until_they_are_here(check):
    old = {"name": "org/moe", "digest": "1" * 64}
    check(old, facts_of(commit=COMMIT, digest=None))
    check(old, facts_of(commit=COMMIT, digest="1" * 64))
    with pytest.raises(ConfigError, match="other weights"):
        check(old, facts_of(commit=COMMIT, digest="2" * 64))


def test_an_artifact_that_knows_nothing_passes_for_no_model(check):
    for facts in (facts_of(commit=COMMIT, digest=None), facts_of()):
        with pytest.raises(ConfigError, match="cannot be known: calibrate this model anew, or set check_model to false"):
            check({"name": "org/moe", "digest": None}, facts)


def test_the_commit_and_not_its_name_is_what_the_job_is_of():
    def settings(revision: str | None) -> dict[str, Any]:
        return job_settings(config_of(revision), model_digest=f"commit:{COMMIT}", fingerprints={}, artifact=b"")

    assert settings("main") == settings(None) == settings(COMMIT)
    assert settings(None)["model_digest"] == f"commit:{COMMIT}" and "model_revision" not in settings(None)


def test_which_rows_meet_is_what_a_job_is_where_it_re_routes():
    settings = job_settings(config_of(), model_digest="m", fingerprints={}, artifact=b"")
    assert set(BATCHING) <= set(settings) and settings["group_by_prefix"] is False
    assert set(BATCHING) <= free_settings(config_of()) & free_settings(config_of(reroute=RerouteConfig(policy="none")))
    assert not set(BATCHING) & free_settings(config_of(reroute=RerouteConfig(policy="oea")))


def test_a_session_from_before_a_setting_differs_in_nothing(caplog):
    now = conditions(config_of())
    driver._warn_of_mixing(config_of(), [Session(1, conditions={k: v for k, v in now.items() if k != "group_by_prefix"})], None)
    assert not caplog.records
    driver._warn_of_mixing(config_of(), [Session(1, conditions={**now, "group_by_prefix": True})], None)
    assert "group_by_prefix was True, is False" in caplog.text


def source_of(fingerprint: str, commit: str) -> Source:
    spec = InputSpec(data="org/prompts", text_column="prompt", data_revision=commit)
    return Source("huggingface", (SourceFile("train", "org/prompts", 2, fingerprint),), spec, commit=commit)


def test_a_hub_dataset_is_its_commit(tmp_path):
    """Jobs begun before data had commits go on where the fingerprint is that of the commit."""
    storage, config = Storage(str(tmp_path / "run")), config_of(reroute=RerouteConfig(policy="oea"))

    def open_job(source: Source, *, earlier: dict[str, str] | None = None, **changes: Any) -> JobFolder:
        changed = dataclasses.replace(config, **changes)
        settings = job_settings(changed, model_digest="m", fingerprints=source.fingerprints, artifact=b"")
        free, known = free_settings(changed), earlier_settings(facts_of(), source)
        return JobFolder(storage, kind_of(source), settings | (earlier or {}), overwrite=False, free=free, earlier=known)

    source = source_of("abc", COMMIT)
    with open_job(source, earlier={"data/train": "2 rows, abc", "data_revision": "main"}) as folder:
        storage.put("results/part-1.parquet", b"some rows")
        digest = folder.digest
    for revision in (None, "main", COMMIT):
        with open_job(source, data_revision=revision) as folder:
            assert folder.digest == digest, "the same job"
    was, now = f"2 rows, abc, commit={COMMIT}", f"2 rows, def, commit={OTHER}"
    with pytest.raises(ConfigError, match=f"data/train was '{was}', is '{now}'.*dataset's commit by data_revision=COMMIT"):
        open_job(source_of("def", OTHER)).__enter__()
