"""Expert similarity without data: the cosine of the experts' weights."""

import torch
from torch import Tensor

from sere.calibration_jobs.capture.experts import Experts
from sere.conf.errors import ConfigError


def check_weights(experts: Experts) -> None:
    """Refuse experts whose weights cannot be compared; works on modules without weights, too.

    Raises:
        ConfigError: if a parameter is not stacked by expert, or is not a plain floating-point one.
    """
    num_experts = experts.num_experts
    for name, parameter in experts.named_parameters():
        if parameter.ndim < 2 or parameter.shape[0] != num_experts or parameter.dtype.itemsize < 2:
            raise ConfigError(
                f"metric 'weights' needs floating-point parameters of shape [{num_experts}, ...], {type(experts).__name__} has "
                f"{name} {parameter.dtype} {list(parameter.shape)}: leave it out of metrics"
            )


def weight_similarity(experts: Experts) -> Tensor:
    """Cosine of every pair of experts' weights (all parameters of an expert as one vector), mapped from [-1, 1] to [0, 1].

    Blind to permutations of an expert's hidden units, and to what inputs it sees: a baseline for the other metrics.

    Args:
        experts: An experts module whose weights are in memory; every parameter's first dimension is the expert.

    Returns:
        float32 `[num_experts, num_experts]`: symmetric, diagonal 1, values in [0, 1].

    Raises:
        ConfigError: as `check_weights`.
    """
    check_weights(experts)
    num_experts = experts.num_experts
    gram = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for parameter in experts.parameters():
        # A few columns at a time: no float64 copy of all weights.
        for block in parameter.detach().flatten(1).split(max(1, (1 << 25) // num_experts), dim=1):
            block = block.double()
            gram += (block @ block.T).cpu()
    norms = gram.diagonal().sqrt().clamp(min=1e-300)
    similarity = ((gram / norms[:, None] / norms[None, :] + 1) / 2).clamp(0, 1)
    return ((similarity + similarity.T) / 2).fill_diagonal_(1).float()
