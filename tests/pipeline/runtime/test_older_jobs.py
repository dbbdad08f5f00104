"""Settings that a job begun earlier lacks: what they count as, whose results its results are, and what it stays."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest

from sere.calibration_jobs.identity import CALIBRATE
from sere.conf.errors import ConfigError
from sere.conf.nested import digest_of, flatten
from sere.conf.schema import CalibrateConfig, GenerateConfig, RerouteConfig
from sere.pipeline.generate.identity import GENERATE
from sere.pipeline.runtime.job_folder import JobFolder, JobKind
from sere.pipeline.runtime.older_jobs import schema_defaults, settings_then
from sere.pipeline.runtime.storage import Storage

KIND = JobKind(
    name="test", finished="end", files=(), results="results", folders={"results": r"part-.+"},
    settings_of_0_1=frozenset({"a"}), absent={"new": 3, "other": (1, 2), "section.new": "x"}, keeps=frozenset({"other"}),
)  # fmt: skip


def begun(tmp_path, settings: dict[str, Any]) -> Storage:
    """A folder of a job with results, begun with these settings."""
    storage = Storage(str(tmp_path / "job"))
    with JobFolder(storage, KIND, settings, overwrite=False):
        storage.put("results/part-1", b"x")
    return storage


def test_a_job_begun_without_a_setting_goes_on_with_its_default_and_keeps_its_digest(tmp_path):
    storage = begun(tmp_path, {"a": 1, "section.b": 2})
    job_file = storage.get("job.json")
    with JobFolder(storage, KIND, {"a": 1, "section.b": 2, "new": 3, "section.new": "x"}, overwrite=False) as folder:
        assert folder.digest == digest_of({"a": 1, "section.b": 2}) and folder.kept == {}
    assert storage.get("job.json") == job_file and storage.get("results/part-1") == b"x"


@pytest.mark.parametrize("change", [{"new": 4}, {"section.new": "y"}, {"unknown": 0}])
def test_another_value_than_the_default_is_another_job(tmp_path, change):
    storage = begun(tmp_path, {"a": 1, "section.b": 2})
    (name,) = change
    with pytest.raises(ConfigError, match=rf"holds another job \({name} was .*, is {change[name]!r}\)"):
        JobFolder(storage, KIND, {"a": 1, "section.b": 2, **change}, overwrite=False).__enter__()


def test_a_section_that_the_job_does_not_have_gets_no_keys(tmp_path):
    storage = begun(tmp_path, {"a": 1, "section": None})
    with pytest.raises(ConfigError, match=r"section\.new was None, is 'x'"):
        JobFolder(storage, KIND, {"a": 1, "section.new": "x"}, overwrite=False).__enter__()


def test_a_job_begun_earlier_stays_as_it_was_in_what_is_kept(tmp_path):
    storage = begun(tmp_path, {"a": 1})
    asked = {"a": 1, "other": (7, 8)}
    with JobFolder(storage, KIND, asked, overwrite=False) as folder:
        assert folder.kept == {"other": (1, 2)} and folder.digest == digest_of({"a": 1})
    with pytest.raises(ConfigError, match="holds another job"):
        JobFolder(storage, KIND, {**asked, "a": 2}, overwrite=False).__enter__()
    with JobFolder(storage, KIND, asked, overwrite=True) as folder:
        assert folder.kept == {} and storage.get("results/part-1") is None
        assert folder.digest == digest_of({"a": 1, "other": [7, 8]})
        storage.put("results/part-1", b"x")
    # One begun with the setting is a job of its own.
    with pytest.raises(ConfigError, match="other was"):
        JobFolder(storage, KIND, {"a": 1, "other": (1, 2)}, overwrite=False).__enter__()


def test_defaults_of_a_schema_are_flat_and_know_sections_that_are_null_by_default():
    @dataclass(kw_only=True)
    class Section:
        needed: int
        dials: tuple[int, ...] = (1, 2)
        values: dict[str, int] = field(default_factory=dict)

    globals()["Section"] = Section

    @dataclass(kw_only=True)
    class Whole:
        name: str = "n"
        section: "Section | None" = None

    assert schema_defaults(Whole) == {"name": "n", "section": None, "section.dials": [1, 2], "section.values": {}}


def test_every_key_with_a_default_is_known_to_both_jobs():
    for kind, config, left_out in (
        (GENERATE, GenerateConfig(model="m", data="d", output="o", reroute=RerouteConfig(policy="none")), {"reroute.policy"}),
        (CALIBRATE, CalibrateConfig(model="m", data="d", output="o"), {"tables"}),
    ):
        made = flatten(dataclasses.asdict(config))
        differing = {key for key, value in kind.absent.items() if key in made and _json(made[key]) != value}
        assert differing == left_out
        assert set(made) - set(kind.absent) == {"model", "data", "output"}


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_only_keys_of_today_are_filled_in():
    assert settings_then({"a": 1}, {"a": 1, "b": 2}, {"b": 5, "c": 6}) == {"a": 1, "b": 5}


def test_a_job_begun_with_what_then_stood_for_a_setting_goes_on_and_is_held_to_it(tmp_path):
    """A hub model was known by its files' digest, or by nothing before its download; now by its commit."""
    for then in ("digest", None):
        storage = begun(tmp_path / str(then), {"a": then})
        earlier = {"a": ("digest", None)}
        for _ in range(2):
            with JobFolder(storage, KIND, {"a": "commit:1"}, overwrite=False, earlier=earlier) as folder:
                assert folder.digest == digest_of({"a": then}), "its results stay its own"
        with pytest.raises(ConfigError, match=r"holds another job \(a was 'commit:1', is 'commit:2'\)"):
            JobFolder(storage, KIND, {"a": "commit:2"}, overwrite=False, earlier=earlier).__enter__()
        assert storage.get("results/part-1") == b"x"


def test_another_value_than_what_may_stand_for_it_is_another_job(tmp_path):
    storage = begun(tmp_path, {"a": "other"})
    with pytest.raises(ConfigError, match=r"a was 'other', is 'commit:1'"):
        JobFolder(storage, KIND, {"a": "commit:1"}, overwrite=False, earlier={"a": ("digest", None)}).__enter__()


@pytest.mark.parametrize("kind", [GENERATE, CALIBRATE], ids=lambda kind: kind.name)
def test_a_model_whose_branch_moved_is_refused_with_what_goes_on(tmp_path, kind):
    storage = Storage(str(tmp_path / "job"))
    with JobFolder(storage, kind, {"model_digest": "commit:1"}, overwrite=False):
        name = "part-s0001-r0000-000000.parquet" if kind is GENERATE else "shard-000000.safetensors"
        storage.put(f"results/{name}", b"x")
    with pytest.raises(ConfigError, match=r"model_digest was 'commit:1', is 'commit:2'\): .*model_revision=COMMIT, choose"):
        JobFolder(storage, kind, {"model_digest": "commit:2"}, overwrite=False).__enter__()
