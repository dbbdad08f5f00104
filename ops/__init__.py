"""Expert re-routing itself: tensors in, tensors out. Knows nothing of Ray, MLflow or datasets.

`reroute_topk` is here; importing the package loads no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sere.ops.op import reroute_topk

if __name__ != "sere.ops":
    # Under two names the torch library would be registered twice, and a class would not be equal to itself.
    raise ImportError("this folder is the package sere.ops: import that (see Install in the README)")

__all__ = ["reroute_topk"]


def __getattr__(name: str) -> Any:
    if name == "reroute_topk":
        from sere.ops.op import reroute_topk

        return reroute_topk
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
