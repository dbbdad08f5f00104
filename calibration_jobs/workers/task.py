"""The nouns of the workers: a task, and results by layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

DIRECTIONS = "directions"
"""Name of the task that finds on what surrogates of a wide model see inputs and outputs."""


def checkpoint_of(name: str) -> str:
    """Of the file that keeps the last checkpoint of a task, by the task's name."""
    return f"{name}.checkpoint"


@dataclass(frozen=True)
class Task:
    """One call of a worker's method. Its result must depend on the arguments alone: any worker may make it, and twice.

    Who wants the result fills it in: the job for groups of shards and weights, the judging for held-out rows.
    """

    name: str
    """Of the file that keeps the result. Nothing is read out of it."""
    method: str
    arguments: tuple[Any, ...]
    batch_size: int | None = None
    """The decode batch that an emulation is of; None for other tasks."""
    shards: tuple[str, ...] = ()
    """Names of the shards of a group, after each of which the worker yields a result; its `num_shards` says how far it is, and
    what has tensors before the last one is a checkpoint, from which another worker may go on. (): the method returns one."""

    @property
    def checkpoint(self) -> str:
        """Name of the file that keeps the last one."""
        return checkpoint_of(self.name)


@dataclass(frozen=True)
class LayerTensors:
    """One tensor for each layer: a worker's result."""

    by_layer: Mapping[int, "Tensor"]

    def to_result(self) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
        """As a task's result: tensors by name, `LAYER`, and nothing beside them."""
        return {str(layer): tensor for layer, tensor in self.by_layer.items()}, {}

    @classmethod
    def from_result(cls, result: tuple[Mapping[str, "Tensor"], Mapping[str, Any]]) -> "LayerTensors":
        """What `to_result` wrote."""
        return cls({int(name): tensor for name, tensor in result[0].items()})
