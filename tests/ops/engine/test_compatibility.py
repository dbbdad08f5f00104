"""`additional_config["sere"]` as it was written for earlier versions means what it meant."""

from sere.conf.schema import RerouteConfig

ALL_KEYS_OF_0_1_0 = {
    "policy": "random",
    "similarity": "models:/demo@champion",
    "metric": "frobenius",
    "primary_top_k": 3,
    "threshold": 0.25,
    "phase": "all",
    "min_tokens": 2,
    "max_tokens": 64,
    "seed": 5,
    "check_model": False,
    "stats_dir": "/tmp/stats",
}
DEFAULTS_OF_0_1_0 = {
    "policy": "sere",
    "metric": "cosine",
    "primary_top_k": 2,
    "threshold": 0.5,
    "phase": "decode",
    "min_tokens": 4,
    "max_tokens": 1024,
    "seed": 0,
    "check_model": True,
    "stats_dir": None,
}


def meaning(values: dict) -> dict:
    """What a section means, of the keys that 0.1.0 knew."""
    config = RerouteConfig.from_dict(values)
    return {key: getattr(config, key) for key in ALL_KEYS_OF_0_1_0}


def test_all_keys_of_0_1_0():
    assert meaning(ALL_KEYS_OF_0_1_0) == ALL_KEYS_OF_0_1_0
    assert RerouteConfig.from_dict(ALL_KEYS_OF_0_1_0) == RerouteConfig(**ALL_KEYS_OF_0_1_0)


def test_defaults_of_0_1_0():
    assert meaning({"similarity": "x"}) == {**DEFAULTS_OF_0_1_0, "similarity": "x"}


def test_every_policy_and_metric_of_0_1_0():
    for policy in ("none", "sere", "top_k", "random"):
        for metric in ("frobenius", "cosine", "cka", "weights"):
            changed = {**ALL_KEYS_OF_0_1_0, "policy": policy, "metric": metric}
            assert meaning(changed) == changed
