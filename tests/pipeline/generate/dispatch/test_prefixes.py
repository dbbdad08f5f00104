"""Batches cut where prompts share little, and who gets them. Without a cluster: tables in place of references."""

import heapq
import os
import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.pipeline.generate.dispatch.affinity import Affinity
from sere.pipeline.generate.dispatch.prefixes import cut_at_prefixes, num_shared
from sere.pipeline.generate.dispatch.work import Batch, Handle, Rows
from tests.examples import examples

# Prompts of a group share this much, of two groups that much: more than next to nothing.
INSIDE, BETWEEN = 400, 100


def rows_of(first, length):
    """Rows as the dispatcher has them; a number in place of a reference."""
    return Rows((("table", first, length),)) if length else Rows()


def numbers_of(batch):
    return [number for _, first, length in batch.rows.pieces for number in range(first, first + length)]


def blocks_of(shared, lengths):
    """What `measure` gives, in blocks of these lengths again and again."""
    start = 0
    while start < len(shared):
        for length in lengths:
            length = min(length, len(shared) - start)
            yield rows_of(start, length), np.array(shared[start : start + length], np.int32)
            start += length


def shared_of(groups, inside=INSIDE, between=BETWEEN):
    """What each row shares with the one before it, in groups of so many rows."""
    return [0, *[number for group in groups for number in (between, *[inside] * (group - 1))][1:]]


@settings(max_examples=examples(200))
@given(one=st.binary(max_size=40), rest=st.binary(max_size=9), other=st.binary(max_size=9))
def test_what_two_texts_share(one, rest, other):
    assert num_shared(one + rest, one + other) == len(os.path.commonprefix([one + rest, one + other]))


@settings(max_examples=examples(200))
@given(
    shared=st.lists(st.integers(0, 500), max_size=60), size=st.integers(1, 12), lengths=st.lists(st.integers(1, 9), min_size=1)
)
def test_every_row_is_in_a_batch_in_order(shared, size, lengths):
    batches = list(cut_at_prefixes(blocks_of(shared, lengths), size))
    assert [number for batch in batches for number in numbers_of(batch)] == list(range(len(shared)))
    assert all(len(batch.rows) <= size for batch in batches)
    assert all(len(batch.rows) >= 0.75 * size for batch in batches[:-1])
    assert [batch.place for batch in batches] == list(range(len(batches)))
    firsts = [shared[numbers_of(batch)[0]] for batch in batches]
    assert [batch.shared for batch in batches] == [first if first >= 64 else 0 for first in firsts]


@settings(max_examples=examples(100))
@given(groups=st.lists(st.integers(1, 4), min_size=1, max_size=30), lengths=st.lists(st.integers(1, 9), min_size=1))
def test_a_group_that_a_batch_has_room_for_is_not_cut(groups, lengths):
    """Of at most a quarter of a batch: there is always a place to cut before it."""
    batches = list(cut_at_prefixes(blocks_of(shared_of(groups), lengths), 16))
    starts = {sum(groups[:number]) for number in range(len(groups))}
    assert all(numbers_of(batch)[0] in starts for batch in batches)


def test_where_batches_end():
    def lengths(shared, size=8):
        return [len(batch.rows) for batch in cut_at_prefixes(blocks_of(shared, [5]), size)]

    assert lengths([0] * 20) == [8, 8, 4], "nothing is shared: full ones"
    assert lengths(shared_of([20])) == [8, 8, 4], "all begin alike"
    assert lengths(shared_of([6, 14])) == [6, 8, 6], "a batch that is three quarters full ends with its prefix"
    assert lengths(shared_of([5, 14])) == [8, 8, 3], "one that is not goes on"
    assert lengths(shared_of([7, 1, 12])) == [8, 8, 4], "full where that cuts nothing"
    assert lengths(shared_of([6, 14], inside=110)) == [8, 8, 4], "of what they share a twelfth would be saved"
    assert lengths(shared_of([6, 14], inside=63, between=0)) == [8, 8, 4], "less than a block of the cache"


def handles(number):
    return [Handle(f"r{index}", f"actor {index}", 0.0) for index in range(number)]


def test_who_gets_which():
    (one, other), affinity = handles(2), Affinity()
    a, b, c, d = (Batch(rows_of(8 * n, 8), place=n, shared=n % 2 * INSIDE) for n in range(4))
    assert affinity.choose(one, [a, b, c, d]) == 0
    affinity.note(one, a)
    assert affinity.choose(other, [b, c, d]) == 1, "b goes on with what the first has, d with c"
    affinity.note(other, c)
    assert affinity.choose(other, [b, d]) == 1 and affinity.choose(one, [b, d]) == 0
    assert affinity.choose(other, [b]) == 0, "nobody waits"
    affinity.forget(one)
    assert affinity.choose(other, [b, Batch(rows_of(32, 8), place=4)]) == 0, "what a dead one had is nobody's"


def test_one_prefix_for_all_is_shared_out_from_both_ends():
    (one, other), affinity = handles(2), Affinity()
    waiting = [Batch(rows_of(n, 1), place=n, shared=INSIDE if n else 0) for n in range(6)]
    taken = {"r0": [], "r1": []}
    for handle in (one, other) * 3:
        batch = waiting.pop(affinity.choose(handle, waiting))
        affinity.note(handle, batch)
        taken[handle.name].append(batch.place)
    assert taken["r0"] == [0, 1, 2] and sorted(taken["r1"]) == [3, 4, 5]


def test_in_order_where_prompts_do_not_matter():
    affinity, (one,) = Affinity(), handles(1)
    assert affinity.choose(one, [Batch(rows_of(0, 8)), Batch(rows_of(8, 8))]) == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_replicas", [2, 5])
def test_few_prefixes_are_computed_twice(num_replicas, seed):
    """Replicas that work on one batch at a time, each for as long as it takes; nobody waits."""
    rng = random.Random(seed)
    groups = [rng.randint(1, 60) for _ in range(200)]

    def num_computed(choose, note):
        """Prefixes that are computed, by all replicas together."""
        batches = list(cut_at_prefixes(blocks_of(shared_of(groups, between=0), [50]), 8))
        free, waiting, owners = [(0.0, number) for number in range(num_replicas)], [], {}
        while batches or waiting:
            waiting += [batches.pop(0) for _ in range(min(len(batches), 32 * num_replicas - len(waiting)))]
            time, number = heapq.heappop(free)
            batch = waiting.pop(choose(replicas[number], waiting))
            note(replicas[number], batch)
            owners.update(dict.fromkeys(numbers_of(batch), number))
            heapq.heappush(free, (time + rng.uniform(0.5, 1.5), number))
        assert len(owners) == sum(groups)
        ends = np.cumsum([0, *groups])
        return sum(len({owners[row] for row in range(first, last)}) for first, last in pairwise(ends))

    affinity, replicas = Affinity(), handles(num_replicas)
    assert num_computed(affinity.choose, affinity.note) <= 1.1 * len(groups)
    assert num_computed(lambda *_: 0, lambda *_: None) > 1.5 * len(groups), "in order, whoever is free"
