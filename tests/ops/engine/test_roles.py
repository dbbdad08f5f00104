"""Roles of a step's rows, against a plain loop, with min_tokens, max_tokens and phase."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.ops.engine.roles import TokenRoles, fill_from_metadata, metadata_gives_counts, metadata_gives_starts
from sere.ops.reference import DECODE, PADDING, PREFILL
from tests.examples import examples


def make(**changes):
    settings_ = dict(capacity=64, device=torch.device("cpu"), decode_length=1, phase="decode", min_tokens=1, max_tokens=64)
    return TokenRoles(**{**settings_, **changes})


def starts(lengths, padding_sequences=0):
    total = [0]
    for length in [*lengths, *[0] * padding_sequences]:
        total.append(total[-1] + length)
    return torch.tensor(total, dtype=torch.int32)


@settings(max_examples=examples(200), deadline=None)
@given(
    before=st.lists(st.none() | st.lists(st.integers(1, 2), min_size=1, max_size=3), max_size=4),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=10),
    padding_sequences=st.integers(0, 4),
    decode_length=st.integers(1, 3),
    phase=st.sampled_from(["decode", "all"]),
    min_tokens=st.integers(1, 8),
    max_tokens=st.integers(1, 40),
)
def test_equals_plain_loop(before, lengths, padding_sequences, decode_length, phase, min_tokens, max_tokens):
    roles = make(decode_length=decode_length, phase=phase, min_tokens=min_tokens, max_tokens=max_tokens)
    roles.roles.fill_(7)
    for steps_before in before:
        roles.clear() if steps_before is None else roles.fill(starts(steps_before))
    roles.fill(starts(lengths, padding_sequences))
    expected = []
    for length in lengths:
        expected += [DECODE if phase == "all" or length <= decode_length else PREFILL] * length
    num_decode = expected.count(DECODE)
    if num_decode < min_tokens or len(expected) > max_tokens:
        expected = [PREFILL] * len(expected)
    expected += [PADDING] * (64 - len(expected))
    assert roles.roles.tolist() == expected
    assert roles.step[:2].tolist() == [num_decode, sum(lengths)]
    assert bool(roles.step[2]) == roles.may_reroute == (DECODE in expected)


def test_buffers_stay_in_place():
    roles = make()
    address = roles.roles.data_ptr()
    roles.fill(starts([1, 1, 5]))
    roles.clear()
    assert roles.roles.data_ptr() == address
    assert not roles.roles.any() and not roles.step.any()


@pytest.mark.parametrize(("phase", "expected"), [("decode", [2, 2, 1, 1, 1, 0]), ("all", [2, 2, 2, 2, 2, 0])])
def test_counts_of_an_ordered_batch(phase, expected):
    roles = make(capacity=6, phase=phase)
    fill_from_metadata(roles, SimpleNamespace(num_decode_tokens=2, num_prefill_tokens=3))
    assert roles.roles.tolist() == expected


def test_which_metadata_is_enough():
    class Lengths:
        query_start_loc: torch.Tensor

    class Counts:
        num_decode_tokens: int
        num_prefill_tokens: int

    class Derived(Counts):
        other: int

    class Nothing:
        num_decode_tokens: int

    kinds = (Lengths, Counts, Derived, Nothing)
    assert [metadata_gives_starts(kind) for kind in kinds] == [True, False, False, False]
    assert [metadata_gives_counts(kind) for kind in kinds] == [False, True, True, False]
