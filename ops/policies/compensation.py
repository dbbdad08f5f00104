"""What is added for experts that were taken away: their mean outputs, or low-rank surrogates of them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sere.conf.errors import ConfigError
from sere.conf.schema.rules import Compensation


def refuse_rank(rank: int, tables: Mapping[str, Tensor]) -> None:
    """Refuse a rank above that of a layer's surrogates.

    Raises:
        ConfigError: with the remedy.
    """
    stored = len(tables["surrogate_means"])
    if rank > stored:
        raise ConfigError(
            f"compensation.rank must be at most {stored}, the artifact's surrogate_rank, got {rank}: lower it, or calibrate "
            f"with surrogate_rank={rank}"
        )


class Compensator:
    """Adds D mu, or D (mu_r + U_r V_r x), to the output of a layer's routed experts, in the units of the routing weights.

    D is what each expert's weight has lost in each row. Kin of MoNE's mean outputs (arXiv 2507.00390), which rank 0 is.
    """

    def __init__(
        self, compensation: Compensation, tables: Mapping[str, Tensor], *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Take what the rank needs out of a layer's tables.

        Args:
            compensation: mean, or surrogate with a rank of 1 or more.
            tables: means, or surrogate_in, surrogate_out `[num_experts * R, hidden_size]` and surrogate_means.
            device: Where the layer runs.
            dtype: Of the layer's activations, in which the tables are kept.

        Raises:
            ConfigError: if the artifact has surrogates of a lower rank only, or the CUDA kernels cannot be compiled.
        """
        self.rank = compensation.rank if compensation.rule == "surrogate" else 0
        self.inputs: Tensor | None = None
        self.outputs: Tensor | None = None
        if not self.rank:
            self.means = tables["means"].to(device, dtype).contiguous()
            self._prepare_launches(device)
            return
        refuse_rank(self.rank, tables)
        stored = len(tables["surrogate_means"])
        self.means = tables["surrogate_means"][self.rank - 1].to(device, dtype).contiguous()
        self.inputs, self.outputs = (
            tables[name].unflatten(0, (-1, stored))[:, : self.rank].flatten(0, 1).to(device, dtype).contiguous()
            for name in ("surrogate_in", "surrogate_out")
        )
        self._prepare_launches(device)

    def _prepare_launches(self, device: torch.device) -> None:
        """Compile the CUDA kernels where they take this layer; torch's operations do the few others."""
        self.launches = False
        if device.type == "cuda":
            from sere.ops.kernels import compensating

            self.launches = compensating.takes(self.means)
            if self.launches:
                compensating.compile_for(self.means.dtype, device)

    @property
    def num_values(self) -> int:
        """Numbers in all its tables: what a step reads at most."""
        return sum(table.numel() for table in (self.means, self.inputs, self.outputs) if table is not None)

    def add(self, output: Tensor, hidden_states: Tensor, difference: Tensor, share: float = 1.0) -> Tensor:
        """The compensated output.

        Args:
            output: Of the routed experts, `[num_tokens, hidden_size]`, before it is summed over ranks and scaled.
            hidden_states: Their input, same shape.
            difference: float32 `[num_tokens, num_experts]`: what each expert's weight has lost.
            share: Of this rank: 1 / n where n ranks' outputs are summed.

        Returns:
            A new tensor like `output`.
        """
        if self.launches and output.dtype == hidden_states.dtype == self.means.dtype:
            from sere.ops.kernels.compensating import compensate

            states, lost = hidden_states.contiguous(), difference.contiguous()
            return compensate(output.contiguous(), states, lost, self.means, self.inputs, self.outputs, share=share)
        lost = difference.to(self.means.dtype)
        added = lost @ self.means
        if self.inputs is not None and self.outputs is not None:
            projections = hidden_states.to(self.means.dtype) @ self.inputs.T
            added = torch.addmm(added, projections * lost.repeat_interleave(self.rank, dim=1), self.outputs)
        return output + (added * share).to(output.dtype)
