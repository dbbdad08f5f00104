"""Many steps at once give what the reference gives step by step."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.calibration_jobs.judge import decode_steps
from sere.calibration_jobs.judge.decode_steps import decode_groups, refilled_steps, reroute_groups, static_steps
from sere.ops.reference import reroute_reference
from tests.examples import examples


def test_groups_are_the_same_position_of_different_sequences():
    valid = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]]).bool()
    assert decode_groups(valid, 2).tolist() == [[0, 3], [1, 4], [6, 9], [7, 10], [8, 11]]
    assert decode_groups(valid, 5).tolist() == [[0, 3, 6, 9, 12], [1, 4, 7, 10, 13]]
    assert decode_groups(valid, 6).tolist() == []


@settings(max_examples=examples(150), deadline=None)
@given(
    num_groups=st.integers(1, 5),
    num_tokens=st.integers(1, 6),
    num_experts=st.integers(2, 12),
    data=st.data(),
    seed=st.integers(0, 9999),
)
def test_equals_the_reference(num_groups, num_tokens, num_experts, data, seed):
    top_k = data.draw(st.integers(1, min(4, num_experts)))
    primary_top_k = data.draw(st.integers(1, top_k))
    thresholds = data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.rand(num_groups, num_tokens, num_experts, generator=generator)
    ids = logits.argsort(dim=2)[..., :top_k].contiguous()
    # Few distinct values: ties of weights and of similarities.
    weights = torch.randint(1, 4, ids.shape, generator=generator).float()
    similarity = torch.randint(0, 5, (num_experts, num_experts), generator=generator).float() / 4
    result = reroute_groups(weights, ids, similarity, primary_top_k=primary_top_k, thresholds=torch.tensor(thresholds))
    for threshold, routed in zip(thresholds, result, strict=True):
        for group in range(num_groups):
            expected = reroute_reference(
                weights[group], ids[group], similarity, primary_top_k=primary_top_k, threshold=threshold
            )
            assert torch.equal(routed[group], expected)


def test_blocks_do_not_change_the_result(monkeypatch):
    weights, similarity = torch.rand(7, 4, 3), torch.rand(9, 9)
    ids = torch.rand(7, 4, 9).argsort(dim=2)[..., :3]
    arguments = {"primary_top_k": 1, "thresholds": torch.tensor([0.0, 0.5])}
    whole = reroute_groups(weights, ids, similarity, **arguments)
    monkeypatch.setattr(decode_steps, "_BLOCK_ELEMENTS", 100)
    assert torch.equal(reroute_groups(weights, ids, similarity, **arguments), whole)


LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=12)


@settings(max_examples=examples(100), deadline=None)
@given(lengths=LENGTHS, batch_size=st.integers(1, 5), refill=st.booleans())
def test_every_token_is_decoded_once_and_in_order(lengths, batch_size, refill):
    width = max(1, *lengths)
    steps = (refilled_steps if refill else static_steps)(lengths, batch_size, width)
    seen = [index for step in steps.tolist() for index in step if index >= 0]
    assert sorted(seen) == [row * width + position for row, length in enumerate(lengths) for position in range(length)]
    for row in range(len(lengths)):
        own = [index for index in seen if index // width == row]
        assert own == sorted(own)
    for step in steps.tolist():
        rows = [index // width for index in step if index >= 0]
        assert len(set(rows)) == len(rows) <= batch_size


def test_static_batches_run_out_and_places_are_refilled():
    assert static_steps([3, 1, 2], 2, 3).tolist() == [[0, 3], [1, -1], [2, -1], [6, -1], [7, -1]]
    assert refilled_steps([3, 1, 2], 2, 3).tolist() == [[0, 3], [1, 6], [2, 7]]
