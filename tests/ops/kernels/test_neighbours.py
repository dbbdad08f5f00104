"""Sorted neighbours against a plain sort, and when the cache of them sorts."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.ops.kernels import neighbours
from sere.ops.kernels.neighbours import neighbours_of, sorted_neighbours
from tests.examples import examples


@settings(deadline=None, max_examples=examples(100))
@given(
    num_experts=st.integers(1, 90),
    levels=st.integers(1, 5),
    threshold=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_sorted_neighbours(num_experts, levels, threshold, seed):
    generator = torch.Generator().manual_seed(seed)
    similarity = (torch.rand(num_experts, num_experts, generator=generator) * levels).round() / levels
    least = torch.tensor(threshold, dtype=torch.float32).item()
    table = sorted_neighbours(similarity, threshold).tolist()
    for expert, row in enumerate(table):
        allowed = [other for other in range(num_experts) if other != expert and similarity[expert, other].item() >= least]
        ranked = sorted(allowed, key=lambda other: (-similarity[expert, other].item(), other))
        assert len(row) % 64 == 0
        assert row == ranked + [expert] * (len(row) - len(ranked))


def test_sorted_once_per_matrix_contents_and_threshold(monkeypatch):
    calls = []

    def counted(similarity, threshold):
        calls.append(threshold)
        return sorted_neighbours(similarity, threshold)

    monkeypatch.setattr(neighbours, "sorted_neighbours", counted)
    similarity = torch.rand(16, 16)
    first = neighbours_of(similarity, 0.5)
    assert neighbours_of(similarity, 0.5) is first and calls == [0.5]
    neighbours_of(similarity, 0.25)
    assert neighbours_of(similarity, 0.5) is first and calls == [0.5, 0.25]
    assert neighbours_of(similarity.clone(), 0.5) is not first and len(calls) == 3
    similarity.fill_(1)
    assert not torch.equal(neighbours_of(similarity, 0.5), first) and len(calls) == 4


def test_a_matrix_that_nobody_holds_is_forgotten():
    similarity = torch.rand(16, 16)
    gone = weakref.ref(neighbours_of(similarity, 0.5))
    del similarity
    gc.collect()
    assert gone() is None


def test_what_cannot_be_cached_or_sorted_now_is_refused(monkeypatch):
    with torch.inference_mode(), pytest.raises(ValueError, match=r"made in inference mode.*outside"):
        neighbours_of(torch.rand(16, 16), 0.5)
    similarity = torch.rand(16, 16)
    known = neighbours_of(similarity, 0.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert neighbours_of(similarity, 0.5) is known
    with pytest.raises(RuntimeError, match="before capturing a CUDA graph"):
        neighbours_of(similarity, 0.25)
