"""The contract, on examples small enough to work out by hand."""

import torch

from sere.ops.reference import reroute_reference

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
