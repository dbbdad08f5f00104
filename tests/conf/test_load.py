"""Configuration: precedence, every shipped YAML, and one-line errors."""

import dataclasses

import pytest
import yaml

from sere.conf.errors import ConfigError
from sere.conf.load import load_config
from sere.conf.schema import CalibrateConfig, GenerateConfig, RerouteConfig
from tests.conftest import ROOT

SHIPPED = {"calibrate": CalibrateConfig, "generate": GenerateConfig}


@pytest.fixture
def minimal(tmp_path):
    file = tmp_path / "g.yaml"
    file.write_text("model: m\ndata: d\noutput: o\nreroute: {policy: sere, similarity: x}\nengine: {max_num_seqs: 8}\n")
    return file


def test_precedence(minimal):
    config = load_config(GenerateConfig, minimal, ["engine.max_num_seqs=4", "reroute.threshold=0.25"])
    assert config.engine.max_num_seqs == 4
    assert load_config(GenerateConfig, minimal).engine.max_num_seqs == 8
    assert config.engine.num_replicas == 1
    assert config.reroute == RerouteConfig(similarity="x", threshold=0.25)


def test_free_form_engine_arguments(minimal):
    config = load_config(GenerateConfig, minimal, ["engine.engine_kwargs={block_size: 16, x: {y: [1, 2]}}"])
    assert config.engine.engine_kwargs == {"block_size": 16, "x": {"y": [1, 2]}}


def test_empty_tracking_uri(minimal):
    assert not load_config(GenerateConfig, minimal, ["tracking.uri="]).tracking.uri


def test_unknown_metric():
    with pytest.raises(ConfigError, match=r"metrics must be some of frobenius, cosine, cka, weights, got \['foo'\]"):
        load_config(CalibrateConfig, ROOT / "conf" / "calibrate.yaml", ["metrics=[foo]"])


def test_section_can_be_switched_off(minimal):
    assert load_config(GenerateConfig, minimal, ["reroute=null"]).reroute is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reroute.threshold=2", "threshold must be between 0 and 1, got 2.0"),
        ("reroute.primary_top_k=0", "primary_top_k must be at least 1, got 0"),
        ("reroute.thresold=1", "unknown key 'reroute.thresold'.*did you mean 'threshold'"),
        ("outptu=x", "unknown key 'outptu'.*did you mean 'output'"),
        ("reroute.policy=magic", r"reroute.policy: Invalid value 'magic', expected one of \['none', 'sere'"),
        ("reroute.similarity=null", "policy 'sere' needs similarity"),
        ("engine.max_num_seqs=abc", "engine.max_num_seqs: Value 'abc'"),
        ("engine.max_num_seqs=0", "max_num_seqs must be at least 1"),
        ("sampling.top_p=0", "top_p must be above 0"),
        ("sampling.temperature=-1", "temperature must be at least 0"),
        ("model=null", "model must be set"),
        ("sampling.temperature=.nan", "temperature must be at least 0 and finite"),
        ("engine.max_model_len=0", "max_model_len must be at least 1"),
        ("engine.cpus_per_replica=-5", "cpus_per_replica must be above 0"),
        ("data=*.jsonl", "put the value in quotes"),
        ("tracking.run_name=[a", "put the value in quotes"),
        ("data=${oops", "put the value in quotes"),
        ("just-a-word", "must have the form key=value"),
    ],
)
def test_errors_are_one_line(minimal, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(GenerateConfig, minimal, [override])
    assert "\n" not in str(caught.value)


def test_file_errors(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(GenerateConfig, tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="must hold keys and values"):
        load_config(GenerateConfig, tmp_path / "list.yaml", ["model=x"])
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(GenerateConfig, tmp_path / "latin.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML") as caught:
        load_config(GenerateConfig, tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)


def keys(schema, prefix=""):
    for field in dataclasses.fields(schema):
        nested = {"reroute": RerouteConfig}.get(field.name) or (
            field.default_factory if dataclasses.is_dataclass(field.default_factory) else None
        )
        yield from keys(nested, f"{prefix}{field.name}.") if nested else [f"{prefix}{field.name}"]


def leaves(values, prefix=""):
    for key, value in values.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_yaml_shows_every_key_and_its_command(name):
    file = ROOT / "conf" / f"{name}.yaml"
    assert file.read_text().startswith(f"# sere {name} conf/{name}.yaml\n")
    load_config(SHIPPED[name], file)
    assert sorted(leaves(yaml.safe_load(file.read_text()))) == sorted(keys(SHIPPED[name]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": "magic"}, "policy must be one of none, sere, oea, .*, got 'magic'"),
        ({"policy": "none", "primary_top_k": "2"}, "primary_top_k must be a number, got '2'"),
        ({"policy": "none", "threshold": True}, "threshold must be a number, got True"),
        ({"policy": "none", "check_model": 1}, "check_model must be bool, got 1"),
        ({"policy": "none", "phase": "prefill"}, "phase must be one of decode, all"),
        ({"polcy": "none"}, "unknown key 'polcy'.*did you mean 'policy'"),
    ],
)
def test_plugin_settings(values, message):
    with pytest.raises(ConfigError, match=message):
        RerouteConfig.from_dict(values)


def test_plugin_settings_round_trip():
    config = RerouteConfig(similarity="x", threshold=1)
    assert RerouteConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("kwargs", "setting"),
    [
        ("{tensor_parallel_size: 2}", "engine.tensor_parallel_size"),
        ("{max_num_seqs: 8}", "engine.max_num_seqs"),
        ("{additional_config: {sere: {policy: none}}}", "reroute"),
    ],
)
def test_what_a_setting_says_is_not_said_twice(minimal, kwargs, setting):
    with pytest.raises(ConfigError, match=rf"engine_kwargs\..* is what {setting} says: set that one instead"):
        load_config(GenerateConfig, minimal, [f"engine.engine_kwargs={kwargs}"])
    load_config(GenerateConfig, minimal, ["engine.engine_kwargs={additional_config: {mine: 1}}"])


def test_as_many_replicas_as_a_slip_of_the_hand_gives_are_refused(minimal):
    with pytest.raises(ConfigError, match="num_replicas and max_replicas must be at most 10000, got 100000000000000000000"):
        load_config(GenerateConfig, minimal, [f"engine.num_replicas={10**20}", f"engine.max_replicas={10**20}"])
