"""Low-rank stand-ins of experts: weighted ridge regression over all tokens, cut to a rank."""

import torch
from torch import Tensor

from sere.calibration_jobs.capture.experts import TokenBlock
from sere.calibration_jobs.tables.base import TableSums, routed

# Tokens for which an expert is not among the router's best count so much.
_FAR_WEIGHT = 0.05
_RIDGE = 0.02
# Elements of weighted inputs held at once (64 MiB of float32).
_BLOCK_ELEMENTS = 1 << 24


class SurrogateSums(TableSums):
    """For each expert, weighted sums of x x', x y' and y y over tokens, with a 1 appended to x.

    A token has weight 1 where the expert is among its router's best 2 top_k, else 0.05: a surrogate is asked for tokens near
    those that chose the expert. The sums of a wide model would be `num_experts * hidden_size^2` numbers each: there inputs are
    projected on their leading directions first, and each expert's outputs on those that a sample can predict (`spec`). Mean
    outputs and their squares are summed as they are.
    """

    def update(self, block: TokenBlock) -> None:
        weights, outputs = self._weights(block), block.outputs.float()
        self.add("means", (weights.T.unsqueeze(1) @ outputs).squeeze(1))
        self.add("energy", (weights.T.double() * outputs.square().sum(2).double()).sum(1))
        states, spec = block.hidden_states.float(), self.spec
        if spec.input_directions is not None:
            states = states @ spec.input_directions.to(states).T
        if spec.output_directions is not None:
            outputs = outputs @ spec.output_directions.to(outputs).transpose(1, 2)
        inputs = torch.cat((states, states.new_ones(len(states), 1)), dim=1)
        num_experts, width = len(outputs), inputs.shape[1]
        squares, products = [], []
        for part in torch.arange(num_experts).split(max(1, _BLOCK_ELEMENTS // inputs.numel())):
            weighted = (weights[:, part].T.unsqueeze(2) * inputs).transpose(1, 2)  # [experts, width, tokens]
            squares.append((weighted.flatten(0, 1) @ inputs).view(len(part), width, width))
            products.append(weighted @ outputs[part])
        self.add("squares", torch.cat(squares))
        self.add("products", torch.cat(products))

    def _weights(self, block: TokenBlock) -> Tensor:
        """Weight of each token for each expert, float32 `[num_tokens, num_experts]`."""
        num_experts = self.spec.num_experts
        near = routed(block, num_experts)
        if block.selection is not None:
            best = block.selection.topk(min(2 * block.topk_ids.shape[1], num_experts), dim=1).indices
            near = torch.zeros_like(near).scatter_(1, best, True)
        return near.float().clamp(min=_FAR_WEIGHT)

    def finalize(self) -> dict[str, Tensor]:
        rank = self.spec.rank
        solved = [_surrogate(*sums, rank) for sums in zip(self.sums["squares"], self.sums["products"], strict=True)]
        inputs, outputs = (torch.stack(parts) for parts in zip(*solved, strict=True))
        count = self.sums["squares"][:, -1, -1]
        centres = self.sums["squares"][:, :-1, -1] / count[:, None]
        if self.spec.output_directions is not None:
            outputs = torch.bmm(outputs, self.spec.output_directions.double())
        # Row r - 1 of an expert: the intercept of its rank r.
        fitted = (torch.einsum("erw,ew->er", inputs, centres).unsqueeze(2) * outputs).cumsum(1)
        means = (self.sums["means"] / count[:, None]).unsqueeze(1) - fitted
        if self.spec.input_directions is not None:
            inputs = inputs @ self.spec.input_directions.double()
        return {
            "surrogate_in": inputs.flatten(0, 1).bfloat16(),
            "surrogate_out": outputs.flatten(0, 1).bfloat16(),
            "surrogate_means": means.transpose(0, 1).bfloat16().contiguous(),
        }

    def explained(self) -> list[float]:
        """Share of the outputs' weighted variance that rank 0, 1, ... explains, over all experts."""
        rank = self.spec.rank
        left, total = torch.zeros(rank + 1, dtype=torch.float64), 0.0
        for squares, products, energy, weighted in zip(
            *(self.sums[name] for name in ("squares", "products", "energy", "means")), strict=True
        ):
            whole_mean = weighted / squares[-1, -1]
            count, mean = squares[-1, -1], products[-1] / squares[-1, -1]
            variance = float(energy - count * whole_mean.square().sum())
            inputs, outputs = _surrogate(squares, products, rank)
            centre = squares[:-1, -1] / count
            moments = squares[:-1, :-1] - count * torch.outer(centre, centre)
            crossed = products[:-1] - count * torch.outer(centre, mean)
            total += variance
            for r in range(rank + 1):
                fit = inputs[:r].T @ outputs[:r]
                left[r] += variance - 2 * (fit * crossed).sum() + ((moments @ fit) * fit).sum()
        return [1 - float(value) / total if total > 0 else 0.0 for value in left]


def _surrogate(squares: Tensor, products: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """One expert's surrogates of every rank: reduced-rank regression.

    Args:
        squares: float64 `[width + 1, width + 1]`, weighted sums of x x' with a 1 appended to x.
        products: float64 `[width + 1, hidden_size]`, of x y'.
        rank: The highest.

    Returns:
        V `[rank, width]` and U `[rank, hidden_size]`, of which the first r rows are the solution of rank r.
    """
    count = squares[-1, -1]
    centre, mean = squares[:-1, -1] / count, products[-1] / count
    covariance = squares[:-1, :-1] / count - torch.outer(centre, centre)
    crossed = products[:-1] / count - torch.outer(centre, mean)
    width = len(covariance)
    ridge = _RIDGE * covariance.diagonal().mean().clamp(min=1e-12)
    factor = torch.linalg.cholesky(covariance + ridge * torch.eye(width, dtype=covariance.dtype))
    # With inputs whitened by the factor, the best fit of a rank is the singular value decomposition's, cut.
    whitened = torch.linalg.solve_triangular(factor, crossed, upper=False)
    left, values, right = torch.linalg.svd(whitened, full_matrices=False)
    known = min(rank, len(values))
    inputs = torch.linalg.solve_triangular(factor.T, left[:, :known], upper=True).T
    outputs = values[:known, None] * right[:known]
    padding = (0, 0, 0, rank - known)
    return torch.nn.functional.pad(inputs, padding), torch.nn.functional.pad(outputs, padding)


def leading_directions(values: Tensor, number: int) -> Tensor:
    """The directions in which some vectors are largest, orthonormal.

    Args:
        values: Float `[num_vectors, size]`.
        number: At most so many directions; fewer if there are fewer vectors.

    Returns:
        float32 `[number, size]`.
    """
    # Of the smaller of the two Gram matrices: there are fewer vectors than a wide model has dimensions.
    values = values.double()
    if len(values) > values.shape[1]:
        return torch.linalg.eigh(values.T @ values).eigenvectors.flip(1)[:, :number].T.float().contiguous()
    found = torch.linalg.eigh(values @ values.T)
    kept = found.eigenvectors.flip(1)[:, :number]
    directions = values.T @ kept
    return torch.linalg.qr(directions).Q.T.float().contiguous()


def num_output_directions(rank: int) -> int:
    """On how many directions the outputs of an expert of a wide model are seen: some more than the surrogate will have."""
    return max(8, 4 * rank)


def predicted_directions(sums: SurrogateSums, number: int) -> Tensor:
    """The directions of each expert's outputs that can be predicted best from its inputs, orthonormal.

    Args:
        sums: Over a sample of tokens, with outputs as they are.
        number: At most so many directions; fewer if inputs or outputs have fewer dimensions.

    Returns:
        float32 `[num_experts, number, hidden_size]`.
    """
    products = sums.sums["products"]
    kept = min(number, products.shape[1] - 1, products.shape[2])
    found = [_surrogate(*parts, kept)[1] for parts in zip(sums.sums["squares"], products, strict=True)]
    return torch.linalg.qr(torch.stack(found).transpose(1, 2)).Q.transpose(1, 2).float().contiguous()
