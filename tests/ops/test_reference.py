"""The contract, on examples small enough to work out by hand."""

import pytest
import torch

from sere.conf.schema import RerouteConfig
from sere.ops.reference import reroute_reference, route_reference

# Four experts: 0 and 1 alike, 2 and 3 alike; 0 and 2 somewhat.
SIMILARITY = torch.tensor([[1.0, 0.9, 0.4, 0.1], [0.9, 1.0, 0.2, 0.2], [0.4, 0.2, 1.0, 0.8], [0.1, 0.2, 0.8, 1.0]])


def reroute(weights, ids, *, primary_top_k=1, threshold=0.0, roles=None, similarity=SIMILARITY):
    roles = None if roles is None else torch.tensor(roles, dtype=torch.int8)
    result = reroute_reference(
        torch.tensor(weights),
        torch.tensor(ids),
        similarity,
        primary_top_k=primary_top_k,
        threshold=threshold,
        roles=roles,
    )
    return result.tolist()


def test_secondary_goes_to_most_similar_primary():
    assert reroute([[0.6, 0.4], [0.7, 0.3]], [[0, 3], [2, 1]]) == [[0, 2], [2, 0]]


def test_rank_is_by_weight_not_by_slot():
    assert reroute([[0.4, 0.6]], [[0, 3]]) == [[3, 3]]


def test_equal_weights_rank_by_slot():
    assert reroute([[0.5, 0.5]], [[3, 0]]) == [[3, 3]]


def test_threshold_is_inclusive_and_compared_as_float32():
    assert reroute([[0.6, 0.4]], [[0, 3]], threshold=0.1) == [[0, 0]]
    assert reroute([[0.6, 0.4]], [[0, 3]], threshold=0.11) == [[0, 3]]


def test_secondary_that_is_primary_elsewhere_stays():
    assert reroute([[0.6, 0.4], [0.7, 0.3]], [[0, 3], [3, 0]]) == [[0, 3], [3, 0]]


def test_equal_similarities_take_the_lowest_expert():
    similarity = torch.full((4, 4), 0.5).fill_diagonal_(1)
    assert reroute([[0.6, 0.4], [0.6, 0.4]], [[2, 0], [1, 0]], similarity=similarity) == [[2, 1], [1, 1]]


def test_prefill_votes_with_all_experts_and_never_changes():
    assert reroute([[0.6, 0.4], [0.6, 0.4]], [[0, 3], [2, 1]], roles=[1, 2]) == [[0, 3], [2, 0]]


def test_padding_neither_votes_nor_changes():
    assert reroute([[0.6, 0.4], [0.6, 0.4]], [[0, 3], [2, 1]], roles=[0, 2]) == [[0, 3], [2, 2]]


def test_unused_slots_pass_through_without_rank_or_vote():
    assert reroute([[0.9, 0.6, 0.4]], [[-1, 0, 1]]) == [[-1, 0, 0]]
    assert reroute([[0.9, 0.6]], [[-1, -1]]) == [[-1, -1]]


def test_all_slots_primary_changes_nothing():
    assert reroute([[0.6, 0.4]], [[0, 3]], primary_top_k=2) == [[0, 3]]


# Two decode rows of four experts, top-2: weights 0.6, 0.4 and 0.7, 0.3 of experts 0, 3 and 2, 1.
STEP = dict(weights=[[0.6, 0.4], [0.7, 0.3]], ids=[[0, 3], [2, 1]])
SCORES = [[0.45, 0.1, 0.15, 0.3], [0.05, 0.24, 0.56, 0.15]]


def route(policy="oea", *, tables=None, scores=SCORES, selection=None, step=STEP, roles=None, renormalize=True, **settings):
    known = {"cosine": SIMILARITY, **{name: torch.tensor(values) for name, values in (tables or {}).items()}}
    weights, ids = route_reference(
        RerouteConfig(policy=policy, similarity="x", threshold=0.0, **settings),
        torch.tensor(step["weights"]),
        torch.tensor(step["ids"]),
        torch.tensor(scores),
        selection=None if selection is None else torch.tensor(selection),
        tables=known,
        roles=None if roles is None else torch.tensor(roles, dtype=torch.int8),
        renormalize=renormalize,
    )
    return [[round(value, 6) for value in row] for row in weights.tolist()], ids.tolist()


def test_own_takes_the_rows_own_best_active_experts():
    # Active: 0 and 2. Row 0 would next choose 2, with p W / P = 0.15 / 0.75; row 1 chooses 0, with 0.05 / 0.8.
    weights, ids = route(primary_top_k=1, weights="keep")
    assert ids == [[0, 2], [2, 0]] and weights == [[0.6, 0.2], [0.7, 0.0625]]
    weights, _ = route(primary_top_k=1)
    assert weights == [[0.75, 0.25], [round(0.7 / 0.7625, 6), round(0.0625 / 0.7625, 6)]]
    weights, _ = route(primary_top_k=1, weights="half")
    assert weights[0] == [round(0.6 / 0.8**0.5, 6), round(0.2 / 0.8**0.5, 6)]


def test_own_leaves_a_slot_empty_where_no_expert_is_left():
    inf = float("inf")
    weights, ids = route(primary_top_k=1, selection=[[0.45, -inf, -inf, 0.3], [-inf, 0.24, 0.56, 0.15]])
    assert ids == [[0, 0], [2, 2]] and weights == [[1.0, 0.0], [1.0, 0.0]]


def test_dropping_by_activity_and_by_vote():
    alike = dict(weights=[[0.6, 0.4], [0.7, 0.3]], ids=[[0, 2], [2, 1]])
    assert route(targets={"rule": "drop"}, weights="keep", primary_top_k=1, step=alike)[0] == [[0.6, 0.4], [0.7, 0.0]]
    assert route("top_k", primary_top_k=1, step=alike) == ([[1.0, 0.0], [1.0, 0.0]], [[0, 0], [2, 2]])
    assert route("top_k", primary_top_k=1, step=alike, renormalize=False)[0] == [[0.6, 0.0], [0.7, 0.0]]


def test_a_fraction_gives_the_rows_of_the_largest_next_shares_one_more_vote():
    # Half of two rows: row 0, whose second slot has 0.4.
    assert route("sere", primary_top_k=1.5)[1] == [[0, 3], [2, 0]]
    assert route("sere", votes={"by_batch": {1: 2, 2: 1.5}})[1] == [[0, 3], [2, 0]]
    assert route("sere", votes={"by_batch": {1: 2, 3: 1}})[1] == STEP["ids"]


def test_ranking_by_what_the_router_ranks_by():
    biased = [[0.3, 0.1, 0.15, 0.9], [0.05, 0.24, 0.56, 0.15]]
    assert route("sere", votes={"primary_top_k": 1, "order": "selection"}, selection=biased)[1] == [[2, 3], [2, 2]]


def test_votes_by_mass_and_by_share():
    assert route("sere", votes={"rule": "mass", "mass": 0.65})[1] == [[0, 3], [2, 0]]
    assert route("sere", votes={"rule": "share", "share": 0.5})[1] == [[0, 3], [2, 0]]
    assert route("naee_skip", tables={"beta": [0.5]}) == ([[0.6, 0.4], [1.0, 0.0]], [[0, 3], [2, 2]])


def test_budgets():
    # Summed probabilities: 0.5, 0.34, 0.71, 0.45.
    assert route("xshare", votes={"budget": 3})[1] == [[0, 3], [2, 3]]
    assert route("xshare", votes={"budget": 1})[1] == [[0, 2], [2, 0]], "firsts come before the budget"
    assert route("des_vote", votes={"budget": 1})[1] == [[2, 2], [2, 2]]
    assert route("des_vote", votes={"budget": 1, "winner": 0.65})[1] == [[2, 2], [2, 2]]
    assert route("des_vote", votes={"budget": 1, "winner": 0.55})[1] == [[0, 2], [2, 0]]
    # Bins: 0.6 and 0.7 are firsts (3), 0.4 / 0.6 lies in (1/2, 1) (2), 0.3 / 0.7 in (1/4, 1/2) (1).
    assert route("lynx", votes={"budget": 3, "winner": 1.0})[1] == [[0, 3], [2, 3]]


def test_benefit_counts_norms_and_keeps_firsts():
    votes = {"rule": "benefit", "benefit": 0.5}
    assert route("sere", votes=votes, tables={"norms": [1.0, 1.0, 1.0, 1.3]})[1] == [[0, 3], [2, 0]]
    assert route("sere", votes=votes, tables={"norms": [0.1, 1.0, 0.1, 1.2]})[1] == [[0, 2], [2, 0]]


def test_exfold_folds_onto_the_expert_of_the_least_loss():
    losses = [[0.0, 0.9, 0.5, 0.9], [0.2, 0.0, 0.7, 0.9], [0.5, 0.9, 0.0, 0.9], [0.8, 0.9, 0.3, 0.0]]
    folds = [[1.0, 0.0, 0.0, 0.0], [0.5, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, -0.25, 1.0]]
    tables = {"fold_losses": losses, "folds": folds, "norms": [1.0, 1.0, 1.0, 1.0]}
    weights, ids = route("exfold", votes={"budget": 2}, tables=tables)
    assert ids == [[0, 2], [2, 0]] and weights == [[0.6, -0.1], [0.7, 0.15]]


def test_protected_experts_are_active_where_a_row_selected_them():
    votes = {"primary_top_k": 1, "protect": True}
    assert route("sere", votes=votes, tables={"protected": [0, 1, 0, 0]})[1] == [[0, 2], [2, 1]]
    assert route("sere", votes=votes, tables={"protected": [0, 0, 0, 0]})[1] == [[0, 2], [2, 0]]


def test_prefill_rows_keep_their_experts_active():
    assert route(primary_top_k=1, roles=[1, 2])[1] == [[0, 3], [2, 3]]


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="policy 'naee_skip' needs the tables beta"):
        route("naee_skip")
