"""How large experts' outputs are: mean norms, mean outputs, and the largest values, which tell super experts."""

import torch
from torch import Tensor

from sere.calibration_jobs.capture.experts import TokenBlock
from sere.calibration_jobs.tables.base import TableSums, routed


class NormSums(TableSums):
    """Mean norm of each expert's output over all tokens, relative to the layer's mean."""

    def update(self, block: TokenBlock) -> None:
        self.add("norms", block.outputs.float().norm(dim=2).double().sum(1))

    def finalize(self) -> dict[str, Tensor]:
        norms = self.sums["norms"]
        return {"norms": (norms / norms.mean().clamp(min=1e-300)).float()}


class OutputSums(TableSums):
    """Mean output of each expert over all tokens: that of its routed tokens alone does not hold for other kinds of text."""

    def update(self, block: TokenBlock) -> None:
        self.add("outputs", block.outputs.double().sum(1))
        self.add("tokens", torch.tensor([float(block.outputs.shape[1])]))

    def finalize(self) -> dict[str, Tensor]:
        return {"means": (self.sums["outputs"] / self.sums["tokens"]).bfloat16()}


class LargestOutputs(TableSums):
    """The largest magnitude in each expert's output, over the tokens that are routed to it.

    `super_experts` compares them over layers.
    """

    def join(self, name: str, first: Tensor, second: Tensor) -> Tensor:
        return torch.maximum(first, second)

    def update(self, block: TokenBlock) -> None:
        largest = block.outputs.abs().amax(2).float()
        self.add("largest", largest.masked_fill(~routed(block, self.spec.num_experts).T, 0).amax(1))

    def finalize(self) -> dict[str, Tensor]:
        raise NotImplementedError("super experts are told over all layers: super_experts")


def super_experts(largest: dict[int, Tensor]) -> dict[int, Tensor]:
    """Experts without which a model breaks (arXiv 2507.23279): their largest output is above the 99.5th percentile of those of
    all layers, and above a tenth of the largest.

    Args:
        largest: By layer, float64 `[num_experts]`.

    Returns:
        By layer, uint8 `[num_experts]`, 1 for a super expert.
    """
    everything = torch.cat(list(largest.values()))
    least = max(torch.quantile(everything, 0.995).item(), everything.max().item() / 10)
    return {layer: (values > least).to(torch.uint8) for layer, values in largest.items()}
