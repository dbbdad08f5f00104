"""Secrets do not reach logs, run directories or MLflow."""

import pytest

from sere.conf.masking import mask_uri, mask_values


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
        "storage_options": {"key": "***", "secret": "***", "token": "***", "client_kwargs": {"endpoint_url": "http://h:1"}},
        "max_tokens": 5,
        "tokenizer": "path",
        "hf_token": "***",
        "lists": [{"password": "***"}, "http://***@h/"],
        "api_key": None,
    }
