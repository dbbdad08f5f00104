"""The experts that may replace each expert, most similar first: sorted once per similarity matrix and threshold.

The one cache of them, asked by the policies and by the public op.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

NEIGHBOURS_PER_SEARCH = 64
"""Entries that reroute.cu tests at a time: rows are filled up to a multiple of it."""

_sorted = WeakTensorKeyDictionary()
"""Per similarity matrix: its contents' version, and its sorted neighbours by threshold."""


def sorted_neighbours(similarity: Tensor, threshold: float) -> Tensor:
    """Sort what turns a search over all experts into a few bit tests.

    Args:
        similarity: float32 `[num_experts, num_experts]`, without NaN.
        threshold: Least similarity that re-routes, compared as float32.

    Returns:
        int16 `[num_experts, n]` on the device of `similarity`: for each expert the others that may replace it; n is a multiple
        of 64. Equally similar experts are in ascending order. Each row is filled up with the expert's own id.
    """
    num_experts = similarity.shape[0]
    # On the CPU, where sorting is stable whatever the values; by name, as vLLM loads models under another default device.
    values = similarity.to("cpu", copy=True)
    too_low = values < torch.tensor(threshold, dtype=torch.float32, device="cpu")
    values[too_low.fill_diagonal_(True)] = -torch.inf
    ranked, order = values.sort(dim=1, descending=True, stable=True)
    own = torch.arange(num_experts, device="cpu").unsqueeze(1)
    order = torch.where(ranked == -torch.inf, own, order)
    num_filled = -num_experts % NEIGHBOURS_PER_SEARCH
    order = torch.cat([order, own.expand(-1, num_filled)], dim=1)
    return order.to(torch.int16).contiguous().to(similarity.device)


def neighbours_of(similarity: Tensor, threshold: float) -> Tensor:
    """Take `sorted_neighbours` from the cache, or sort them if the matrix is new or was changed.

    Raises:
        ValueError: if `similarity` was made in inference mode.
        RuntimeError: if they would have to be sorted while a CUDA graph is being captured.
    """
    if similarity.is_inference():
        # Such tensors have no version: neighbours sorted before a change in place would go on being used after it.
        raise ValueError("similarity was made in inference mode, where changes of it cannot be seen: make it outside of it")
    version = similarity._version
    known_version, by_threshold = _sorted.get(similarity, (version, {}))
    if known_version != version:
        by_threshold = {}
    if threshold not in by_threshold:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "re-route once with this similarity matrix and threshold before capturing a CUDA graph: its neighbours are "
                "sorted at the first call"
            )
        by_threshold[threshold] = sorted_neighbours(similarity, threshold)
        _sorted[similarity] = version, by_threshold
    return by_threshold[threshold]
