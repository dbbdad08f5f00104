"""Which expert can stand in for another, and by which factor, over tokens that were routed to both (ExFold, 2608.24938)."""

import torch
from torch import Tensor

from sere.calibration_jobs.capture.experts import TokenBlock
from sere.calibration_jobs.tables.base import TableSums, routed

_CLIP, _RIDGE = 4.0, 1e-3
# Elements of a block's pairs of outputs held at once (64 MiB of float32).
_BLOCK_ELEMENTS = 1 << 24


class FoldSums(TableSums):
    """For each expert u and each v that a token is routed to beside it: sums of w <u, v>, w |v|^2 and w |u|^2, with w = |u|."""

    def update(self, block: TokenBlock) -> None:
        num_experts, num_tokens, hidden_size = block.outputs.shape
        both = routed(block, num_experts).double()
        products = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        squares_u, squares_v = torch.zeros_like(products), torch.zeros_like(products)
        for part in torch.arange(num_tokens).split(max(1, _BLOCK_ELEMENTS // (num_experts * (hidden_size + num_experts)))):
            outputs = block.outputs[:, part].transpose(0, 1).float()
            hit = both[part]
            gram = (outputs @ outputs.transpose(1, 2)).double()
            squares = gram.diagonal(dim1=1, dim2=2)
            weight = squares.clamp(min=0).sqrt() * hit
            pairs = weight.unsqueeze(2) * hit.unsqueeze(1)
            products += (pairs * gram).sum(0).cpu()
            squares_v += (weight.T @ (squares * hit)).cpu()
            squares_u += ((weight * squares).T @ hit).cpu()
        self.add("products", products)
        self.add("squares_u", squares_u)
        self.add("squares_v", squares_v)

    def finalize(self) -> dict[str, Tensor]:
        products, squares_u = self.sums["products"], self.sums["squares_u"]
        folds = (products / (self.sums["squares_v"] + _RIDGE)).clamp(-_CLIP, _CLIP)
        explained = folds * products / squares_u.clamp(min=1e-300)
        losses = torch.where(squares_u > 0, 1 - explained, 1.0).clamp(0, 1)
        return {"folds": folds.float(), "fold_losses": losses.fill_diagonal_(0).float()}
