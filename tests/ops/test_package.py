"""What the package `sere.ops` gives by itself."""

import pytest

import sere.ops


def test_the_public_op_is_loaded_when_asked_for():
    from sere.ops.op import reroute_topk

    assert sere.ops.reroute_topk is reroute_topk
    with pytest.raises(AttributeError, match="has no attribute 'reroute'"):
        _ = sere.ops.reroute
