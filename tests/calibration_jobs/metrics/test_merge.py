"""Sums of groups of shards: any order, any grouping, the same matrices; and what waits for its turn."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.calibration_jobs.metrics import METRIC_CLASSES, similarity_matrices
from sere.calibration_jobs.metrics.base import ShardSums, SumKey
from sere.calibration_jobs.metrics.merge import InOrder, MergedSums
from sere.calibration_jobs.shards import Shard, make_groups
from tests.examples import examples

TOKENS = {None: 12, 0: 12, 1: 12}
METRICS = ("frobenius", "cosine", "cka")
GROUPS = make_groups(tuple(Shard(i, ()) for i in range(9)), None)


def outputs(index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(1, 12, 6, generator=generator) + torch.randn(5, 12, 6, generator=generator)


def sums_of(index: int) -> ShardSums:
    found = {}
    for name in METRICS:
        metric = METRIC_CLASSES[name](5)
        metric.update(outputs(index))
        # As if domain 0 were in every shard, and domain 1 in every third.
        found |= {SumKey(3, name, part): metric.sums for part in (None, 0, *([1] if index % 3 == 0 else []))}
    return ShardSums(sums=found, num_tokens=TOKENS, num_shards=1, elapsed_s=0.1, peak_memory_bytes=1)


def merged(indices) -> MergedSums:
    result = MergedSums()
    for index in indices:
        result.add(GROUPS[index], sums_of(index))
    return result


def test_halves_and_domains():
    result = merged(range(9))
    assert result.num_tokens() == 108 and result.num_shards == 9
    assert result.num_tokens(domain=1) == 36 and result.num_tokens(half=1) == 48 and result.num_tokens(domain=1, half=1) == 12
    of_one = torch.cat([outputs(index) for index in (0, 3, 6)], dim=1)
    of_half = torch.cat([outputs(index) for index in (1, 3, 5, 7)], dim=1)
    for name in ("frobenius", "cosine"):
        for found, tokens in ((result.matrices(domain=1), of_one), (result.matrices(half=1), of_half)):
            torch.testing.assert_close(found[3, name], similarity_matrices(tokens, [name])[name], atol=1e-6, rtol=0)
    assert result.matrices(domain=2) == {}


def test_any_order_gives_the_same_up_to_rounding():
    order = list(range(9))
    random.Random(0).shuffle(order)
    first, other = merged(range(9)).matrices(), merged(order).matrices()
    for key, matrix in first.items():
        torch.testing.assert_close(matrix, other[key], atol=1e-12, rtol=0)


def test_adding_does_not_change_what_was_added():
    found = sums_of(0)
    before = {key: tensor.clone() for key, tensor in found.sums.items()}
    result = MergedSums()
    for _ in range(2):
        result.add(GROUPS[0], found)
    result.matrices()
    result.matrices()
    assert all(torch.equal(tensor, before[key]) for key, tensor in found.sums.items()) and result.num_tokens() == 24


@settings(max_examples=examples(30))
@given(order=st.permutations(range(9)), num_fitting=st.integers(0, 9))
def test_turns(order, num_fitting):
    """All come in order; those that found no room are read, each once, and no more wait than are let."""
    arrived, read = [sums_of(0)] * 9, []

    def read_again(group):
        read.append(group.index)
        return None

    turns, came = InOrder(GROUPS, read_again, max_bytes=num_fitting * arrived[0].num_bytes), []
    for index in order:
        came += [(group.index, found) for group, found in turns.arrive(GROUPS[index], arrived[index])]
        assert sum(sums is not None for sums in turns._waiting.values()) <= num_fitting
    assert [index for index, _ in came] == list(range(9))
    assert read == [index for index, found in came if found is None] and (num_fitting < 8 or not read)
    if num_fitting == 0:
        # Those before which another was due.
        assert read == [index for index in range(9) if any(order.index(before) > order.index(index) for before in range(index))]
