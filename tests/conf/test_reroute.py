"""What settings of a policy mean, and which make no sense."""

import json

import pytest

from sere.conf.errors import ConfigError
from sere.conf.schema import RerouteConfig
from sere.conf.schema.named import NAMED, unused_settings
from sere.conf.schema.rules import Compensation, Rules, Targets, Votes

OWN = dict(policy="oea")


def config(**values) -> RerouteConfig:
    return RerouteConfig.from_dict(values)


def test_a_config_of_earlier_means_what_it_meant():
    found = config(policy="sere", similarity="x", metric="cka", primary_top_k=3, threshold=0.25).rules()
    targets = Targets(rule="similar", metric="cka", threshold=0.25)
    assert found == Rules(votes=Votes(rule="top", primary_top_k=3), targets=targets, weights="keep")
    assert config(policy="random", seed=7).rules().targets == Targets(rule="random", seed=7)
    assert config(policy="top_k").rules().weights == "router"


def test_whole_numbers_stay_whole():
    assert json.dumps(config(**OWN, primary_top_k=2.0).to_dict()["primary_top_k"]) == "2"
    assert config(**OWN, primary_top_k=2.5).rules().votes.primary_top_k == 2.5


def test_overrides_and_layers():
    found = config(**OWN, votes={"by_batch": {"1": 4, "16": 2}}, per_layer={"3": {"primary_top_k": 1, "weights": "half"}})
    assert found.rules(0).votes.steps() == ((1, 4.0), (16, 2.0)) and found.rules(0).weights == "renormalize"
    assert found.rules(3).weights == "half"
    other = config(**OWN, votes={"rule": "mass", "mass": 0.4}, per_layer={3: {"votes": {"mass": 0.6}}})
    assert other.rules(1).votes == Votes(rule="mass", mass=0.4) and other.rules(3).votes == Votes(rule="mass", mass=0.6)
    anew = config(**OWN, votes={"rule": "mass", "mass": 0.4}, per_layer={3: {"votes": {"rule": "share", "share": 0.5}}})
    assert anew.rules(3).votes == Votes(rule="share", share=0.5)
    assert RerouteConfig.from_dict(json.loads(json.dumps(anew.to_dict()))) == anew


def test_none_is_the_unmodified_model_whatever_else_is_said(tmp_path):
    """`reroute.policy=none` over a file that overrides rules: the baseline of every comparison."""
    said = dict(votes={"rule": "mass"}, compensation={"rule": "mean"}, per_layer={1: {"primary_top_k": 1}}, weights="half")
    for values in (said, {"policy_file": str(tmp_path / "p.json")}):
        found = config(policy="none", **values).resolved()
        assert found.rules(0) == found.rules(1) == config(policy="none").rules() and not found.needs_tables
        assert not found.rules(1).changes_routing(8)


def test_rank_0_is_the_mean():
    surrogate = config(policy="sere_t", similarity="x", compensation={"rank": 2})
    assert surrogate.rules().compensation == Compensation(rule="surrogate", rank=2)
    assert config(policy="sere_t", similarity="x").rules().compensation.rule == "mean"
    assert set(surrogate.needs_tables) == {"surrogate_in", "surrogate_out", "surrogate_means"}


@pytest.mark.parametrize("name", NAMED)
def test_every_name_makes_rules(name):
    budget = {"budget": 9} if NAMED[name].votes["rule"] == "budget" else {}
    rules = config(policy=name, similarity="x", votes=budget).rules()
    assert ("similarity" in unused_settings(name)) == (not rules.tables())
    assert ("primary_top_k" in unused_settings(name)) == (rules.votes.rule != "top")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(policy="sere"), "policy 'sere' needs similarity: the path of an artifact"),
        (dict(policy="sere_t"), "policy 'sere_t' needs similarity.*means"),
        (dict(policy="xshare"), "votes.budget, the number of experts that stay active, must be set to 1 or more, got None"),
        (dict(policy="xshare", votes={"budget": 0}), "votes.budget, .*must be set to 1 or more, got None"),
        (dict(**OWN, votes={"rule": "share", "budget": 3}), "votes.budget is no dial of votes.rule=share"),
        (dict(**OWN, votes={"rule": "tpo"}), "votes.rule must be one of all, top, mass"),
        (dict(**OWN, votes={"mas": 1}), "unknown key 'votes.mas'.*did you mean 'mass'"),
        (dict(**OWN, votes={"rule": "mass", "mass": 0}), "votes.mass must be above 0"),
        (dict(**OWN, votes={"primary_top_k": "two"}), "votes.primary_top_k must be a number, got 'two'"),
        (dict(**OWN, votes={"by_batch": {"a": 1}}), "votes.by_batch must map decode rows"),
        (dict(**OWN, votes={"by_batch": {}}), "votes.by_batch must have 1 to 8 entries"),
        (dict(**OWN, votes={"protect": 1}), "votes.protect must be true or false"),
        (dict(**OWN, votes="top"), "votes must be a mapping, got 'top'"),
        (dict(**OWN, weights="fold"), "weights 'fold' needs targets 'least_loss'"),
        (dict(**OWN, weights="double"), "weights must be one of keep"),
        (dict(**OWN, votes={"rule": "budget", "budget": 4}, targets={"rule": "drop"}), "leave rows without an expert"),
        (dict(**OWN, compensation={"rule": "surrogate", "rank": 65}), "compensation.rank must be between 0"),
        (dict(**OWN, compensation={"rule": "mean", "rank": 1}), "compensation.rank is no dial of compensation.rule=mean"),
        (dict(**OWN, per_layer={"x": {}}), "per_layer must have layer indices"),
        (dict(**OWN, per_layer={0.7: {}}), r"per_layer must have layer indices.*got 0\.7"),
        (dict(**OWN, per_layer={-1: {}}), "per_layer must have layer indices.*got -1"),
        (dict(**OWN, primary_top_k=float("nan")), "primary_top_k must be at least 1 and finite, got nan"),
        (dict(**OWN, primary_top_k=float("inf")), "primary_top_k must be at least 1 and finite, got inf"),
        (dict(**OWN, per_layer={1: {"vots": {}}}), "unknown key 'per_layer.1.vots'.*did you mean 'votes'"),
        (dict(**OWN, per_layer={1: {"primary_top_k": 0}}), "per_layer.1: primary_top_k must be at least 1"),
        (dict(per_layer={"0": {}, 0: {}}), "per_layer names layer 0 twice"),
        (dict(**OWN, compensation={"rank": 2}), r"no dial of compensation.rule=none .*or set compensation.rule=surrogate"),
        (dict(**OWN, votes={"rule": "budget", "budget": -3}), "votes.budget, the number of experts .*, got -3"),
    ],
)
def test_what_makes_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        config(**values)


def test_policy_file(tmp_path):
    file = tmp_path / "policy.json"
    file.write_text(json.dumps({"policy": "oea", "primary_top_k": 3, "per_layer": {"2": {"primary_top_k": 4}}}))
    found = config(policy_file=str(file), min_tokens=7).resolved()
    assert (found.policy, found.primary_top_k, found.min_tokens, found.policy_file) == ("oea", 3, 7, None)
    assert found.rules(2).votes.primary_top_k == 4
    for content, message in (
        ("{", "is no JSON"),
        ("[]", "must hold keys and values"),
        ('{"min_tokens": 4}', "unknown key 'min_tokens' in policy_file"),
        ('{"policy": "sere_t"}', "policy_file .*policy 'sere_t' needs similarity"),
    ):
        file.write_text(content)
        with pytest.raises(ConfigError, match=message):
            config(policy_file=str(file)).resolved()
    with pytest.raises(ConfigError, match=r"none.json cannot be read \(No such file"):
        config(policy_file=str(tmp_path / "none.json")).resolved()


def test_a_policy_file_replaces_all_of_its_keys(tmp_path):
    """Also those of a shipped file that names a policy, which cannot be unsaid on the command line."""
    file = tmp_path / "policy.json"
    file.write_text('{"policy": "top_k"}')
    found = config(policy="oea", primary_top_k=3, votes={"rule": "all"}, min_tokens=7, policy_file=str(file))
    assert found.replaced_by_file == {"policy": "oea", "primary_top_k": 3, "votes": {"rule": "all"}}
    assert found.resolved() == config(policy="top_k", min_tokens=7)
    assert found.resolved().replaced_by_file == {}


def test_a_layers_own_dial_comes_before_those_of_all_layers():
    votes = {"rule": "top", "primary_top_k": 2.5, "by_batch": {1: 4, 16: 2.5}}
    found = config(policy="oea", votes=votes, per_layer={0: {"primary_top_k": 4}, 1: {"votes": {"by_batch": {1: 5}}}})
    assert list(found.rules(0).votes.steps()) == [(1, 4)] and list(found.rules(1).votes.steps()) == [(1, 5)]
    assert found.rules(2) == found.rules(None)
    targets = {"rule": "similar", "threshold": 0.3, "metric": "cka"}
    found = config(policy="sere", similarity="x", targets=targets, per_layer={0: {"threshold": 0.7, "metric": "cosine"}})
    assert (found.rules(0).targets.threshold, found.rules(0).targets.metric) == (0.7, "cosine")
