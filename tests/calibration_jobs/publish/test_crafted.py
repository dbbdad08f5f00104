"""Artifacts that nobody's `sere calibrate` wrote: refused in one line, or shown as they are."""

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sere.calibration_jobs.publish.diff import diff
from sere.calibration_jobs.publish.inspect import inspect
from sere.calibration_jobs.publish.promote import promote
from sere.conf.errors import ConfigError
from tests.calibration_jobs.publish.artifacts import artifact
from tests.examples import examples

MARKUP = "[/nope] [bold] [link=x]"
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
JSON = st.recursive(
    LEAVES,
    lambda values: st.lists(values, max_size=2) | st.dictionaries(st.text(max_size=6), values, max_size=2),
    max_leaves=5,
)


def with_manifest(**changes):
    made = artifact()
    return dataclasses.replace(made, manifest={**made.manifest, **changes})


def places(value, path=()):
    """All paths into nested values."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], new)
    return changed


QUALITY = {
    **artifact().manifest["quality"],
    "transfer": {"cosine": {"domains": ["a", "b"], "spearman": [[1, 0.5], [0.5, 1]], "decision": [[1, 0.5], [0.5, 1]]}},
    "transfer_error": {"a": [{"candidate": "cosine", "error": 0.1}]},
}


@given(st.sampled_from([path for path in places(QUALITY) if path]), JSON)
@settings(max_examples=examples(100), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_figures_of_any_type_are_shown_or_refused(tmp_path, printed, path, value):
    file = with_manifest(quality=replaced(QUALITY, path, value)).save(tmp_path / "crafted.safetensors")
    good = artifact().save(tmp_path / "good.safetensors")
    for command in (
        lambda: inspect(str(file), uri=None, output=None, console=printed),
        lambda: diff(str(file), str(good), uri=None, console=printed),
    ):
        try:
            command()
        except ConfigError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 600


@pytest.mark.parametrize("value", [None, "x", 1, [1], {}])
def test_pictures_of_damaged_figures_are_refused(tmp_path, printed, value):
    quality = {"reliability": [{"num_tokens": value, "metrics": value}], "held_out": QUALITY["held_out"]}
    file = with_manifest(quality=quality).save(tmp_path / "crafted.safetensors")
    with pytest.raises(ConfigError, match="did not write"):
        inspect(str(file), uri=None, output=str(tmp_path / "pictures"), console=printed)


def test_what_looks_like_markup_is_printed_as_it_is(tmp_path, printed):
    quality = {**QUALITY, "transfer": {MARKUP: {**QUALITY["transfer"]["cosine"], "domains": [MARKUP, "b"]}}}
    quality["transfer_error"] = {MARKUP: [{"candidate": MARKUP, "error": 0.1}]}
    quality["emulation"] = [{**QUALITY["emulation"][0], "policy": MARKUP}]
    made = with_manifest(quality=quality, model={"name": MARKUP, "digest": "d"}, **{MARKUP: MARKUP})
    folder = tmp_path / "[red]"
    first = made.save(folder / "a.safetensors")
    inspect(str(first), uri=None, output=None, console=printed)
    diff(str(first), str(artifact().save(folder / "b.safetensors")), uri=None, console=printed)
    text = printed.file.getvalue()
    assert text.count(MARKUP) >= 6 and "[red]" in text


def test_looking_makes_no_store(tmp_path, printed):
    uri = f"sqlite:///{tmp_path}/typo.db"
    for command in (
        lambda: inspect("models:/m@candidate", uri=uri, output=None, console=printed),
        lambda: diff("models:/m/1", "models:/m/2", uri=uri, console=printed),
        lambda: promote("models:/m/1", uri=uri, console=printed),
    ):
        with pytest.raises(ConfigError, match="no MLflow store at"):
            command()
    assert not list(tmp_path.iterdir())
