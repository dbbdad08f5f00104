"""Which shards are summed up together: decided by their number alone, the halves equal."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.calibration_jobs.shards import Shard, make_groups
from tests.examples import examples


def shards(number: int) -> list[Shard]:
    return [Shard(index, ()) for index in range(number)]


@settings(max_examples=examples(100))
@given(number=st.integers(1, 3000), max_groups=st.sampled_from([2, 3, 4, 8, 64, 200]))
def test_every_shard_is_in_one_group_of_its_half(number, max_groups):
    groups = make_groups(shards(number), max_groups)
    assert [group.index for group in groups] == list(range(len(groups))) and len(groups) <= max(2, max_groups)
    assert sorted(shard.index for group in groups for shard in group.shards) == list(range(number))
    for group in groups:
        indexes = [shard.index for shard in group.shards]
        assert indexes == list(range(indexes[0], indexes[0] + 2 * len(indexes), 2)), "in order"
        assert {shard.half for shard in group.shards} == {group.half} == {group.index % 2}
    for even, odd in zip(groups[::2], groups[1::2], strict=False):
        assert len(even.shards) - len(odd.shards) in ((0,) if even is not groups[-2] else (0, 1)), "of the same size"
    assert len({group.name for group in groups}) == len(groups)


@pytest.mark.parametrize("number", [1, 2, 10, 63, 64])
def test_few_shards_are_by_themselves_and_keep_their_names(number):
    for groups in (make_groups(shards(number), 64), make_groups(shards(number), None)):
        assert [group.name for group in groups] == [f"shard-{index:06d}" for index in range(number)]


def test_sizes_double_and_then_fall():
    groups = make_groups(shards(1000), 64)
    sizes = [len(group.shards) for group in groups[::2]]
    assert len(groups) == 64 and sizes[:6] == [1, 1, 2, 4, 8, 16]
    assert sizes[7:] == sorted(sizes[7:], reverse=True) and max(sizes) == 33 and sizes[-1] == 2
    assert (groups[12].name, groups[12].shards[0].index) == ("shards-000064-000126", 64)
    assert len(make_groups(shards(1000), None)) == 1000
