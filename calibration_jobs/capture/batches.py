"""Which tokens go through a model at once: rows as a padded batch, and how many tokens fit a block of all experts' outputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sere.conf.errors import ConfigError
from sere.conf.schema import CalibrateConfig


def pad_rows(rows: Sequence[Sequence[int]], device: Any = "cpu") -> dict[str, Tensor]:
    """Token rows as one batch: `input_ids` and `attention_mask`, int64 `[num_rows, longest row]`, padded on the right.

    The padding token does not matter: it is masked, follows every other token, and does not count.
    """
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def block_tokens_of(config: CalibrateConfig, *, num_experts: int, hidden_size: int) -> int:
    """Tokens of a block: `block_tokens`, or as many as fit `max_activation_bytes`.

    A token takes its outputs of all experts in the model's dtype, and two float32 copies that the metrics make.

    Raises:
        ConfigError: if not even four tokens fit, the least that the CKA estimate needs.
    """
    bytes_per_token = num_experts * hidden_size * ((4 if config.dtype == "float32" else 2) + 8)
    fitting = config.max_activation_bytes // bytes_per_token
    if fitting < 4:
        raise ConfigError(
            f"max_activation_bytes must be at least {4 * bytes_per_token} for this model (4 tokens of {num_experts} experts of "
            f"{hidden_size} values, {bytes_per_token} bytes a token), got {config.max_activation_bytes}"
        )
    return min(config.block_tokens, fitting)
