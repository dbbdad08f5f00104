"""Secrets do not reach logs, run directories or MLflow."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sere.conf.masking import mask_uri, mask_values
from sere.conf.schema import CalibrateConfig, GenerateConfig

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://user:secret@host:5432/db", "postgresql://***@host:5432/db"),
        ("https://token@host/x?sig=abc&x=1", "https://***@host/x?***"),
        (
            "cannot reach 's3://key:sec@bucket/a' or https://h/y?token=abc now",
            "cannot reach 's3://***@bucket/a' or https://h/y?*** now",
        ),
        ("sqlite:///runs/mlflow.db", "sqlite:///runs/mlflow.db"),
        ("s3://bucket/prompts/*.jsonl", "s3://bucket/prompts/*.jsonl"),
        ("what?", "what?"),
        ("https://h/cb#access_token=abc&x=1", "https://h/cb#***"),
        ("postgresql://user:pa/ss'w o@rd@host/db", "postgresql://***@host/db"),
        ("s3://bucket/me@home/x", "s3://bucket/me@home/x"),
        ("http://h:5000 has no models:/sere-demo@candidate", "http://h:5000 has no models:/sere-demo@candidate"),
        ("http://a:b@h has no models:/m@x", "http://***@h has no models:/m@x"),
        ("AccountName=me;AccountKey=abc==;x=y", "AccountName=me;AccountKey=***;x=y"),
        ("header Authorization: Bearer abc.def", "header Authorization: Bearer ***"),
    ],
)
def test_uris(text, shown):
    assert mask_uri(text) == shown


def test_keys():
    values = {
        "storage_options": {"key": "AKIA", "secret": "s", "token": "t", "client_kwargs": {"endpoint_url": "http://h:1"}},
        "max_tokens": 5,
        "tokenizer": "path",
        "hf_token": "x",
        "lists": [{"password": "p"}, "http://u:p@h/"],
        "api_key": None,
    }
    assert mask_values(values) == {
        "storage_options": {"key": "***", "secret": "***", "token": "***", "client_kwargs": "***"},
        "max_tokens": 5,
        "tokenizer": "path",
        "hf_token": "***",
        "lists": [{"password": "***"}, "http://***@h/"],
        "api_key": None,
    }


@pytest.mark.parametrize(
    "name",
    ["connection_string", "pat", "pwd", "auth", "Authorization", "X-Api-Key", "accountKey", "userToken", "sas", "private_key"],
)
def test_names_of_secrets(name):
    assert mask_values({"headers": {name: SECRET}, name: [SECRET]}) == {"headers": {name: "***"}, name: ["***"]}


@pytest.mark.parametrize("name", ["path", "compat", "author", "monkey", "max_tokens", "tokenizer", "keys", "passes"])
def test_names_that_only_look_like_it(name):
    assert mask_values({name: "x"}) == {name: "x"}


@given(
    st.dictionaries(st.text(min_size=1), st.recursive(st.just(SECRET), lambda v: st.lists(v) | st.dictionaries(st.text(), v)))
)
def test_of_storage_options_only_the_names_are_recorded(options):
    masked = mask_values({"base": {"storage_options": options}})["base"]["storage_options"]
    assert masked == dict.fromkeys(options, "***")


WITHOUT_LINES = st.text(st.characters(exclude_characters="\n\r", exclude_categories=("Cs",)), max_size=20)


@given(WITHOUT_LINES, WITHOUT_LINES, st.sampled_from(["postgresql", "http", "s3", "mysql+pymysql"]))
def test_no_password_is_shown_whatever_is_in_it(before, after, scheme):
    """In a value, and in the text of an error about it."""
    uri = f"{scheme}://user:{before.replace('://', '')}{SECRET}{after.replace('://', '')}@host/db"
    for text in (uri, f"cannot open {uri!r}", f"cannot open {uri}: refused"):
        assert SECRET not in mask_uri(text) and SECRET not in json.dumps(mask_values({"uri": text}))
    assert mask_uri(uri).endswith("@host/db")


@given(st.text())
def test_what_is_masked_stays_so(text):
    assert mask_uri(mask_uri(text)) == mask_uri(text)


def test_no_setting_is_hidden_that_is_none():
    for config in (GenerateConfig(model="m", data="d", output="o"), CalibrateConfig(model="m", data="d", output="o")):
        values = dataclasses.asdict(config)
        assert json.dumps(mask_values(values)) == json.dumps(values)
