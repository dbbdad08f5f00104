"""Feeds every calibration token through all experts of each MoE layer, for any Transformers MoE model.

Since Transformers 5, about 55 model families compute their experts in one module with
`forward(hidden_states, top_k_index, top_k_weights)`. Calling it with one forced expert and weight 1 gives that expert's own
output; no per-architecture code is needed.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import ConfigError

_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")
# Elements of expert outputs held at once (512 MiB of float32); also keeps CKA minibatches alike.
_CHUNK_ELEMENTS = 1 << 27
_CHUNK_TOKENS = 256


def find_expert_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The experts module of each MoE layer, by layer index.

    Raises:
        ConfigError: if the model has none.
    """
    found = {}
    for name, module in model.named_modules():
        parameters = tuple(inspect.signature(module.forward).parameters)
        index = re.search(r"(?:^|\.)(\d+)\.", name)
        if parameters[:3] == _ARGUMENTS and index and hasattr(module, "num_experts"):
            found[int(index.group(1))] = module
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no experts module with forward({', '.join(_ARGUMENTS)}): not a MoE model that "
            "Transformers 5 computes that way, so its experts cannot be compared"
        )
    return found


def expert_outputs(experts: nn.Module, hidden_states: Tensor) -> Tensor:
    """Outputs of every expert for the same tokens.

    Args:
        experts: An experts module.
        hidden_states: `[num_tokens, hidden_size]`.

    Returns:
        `[num_experts, num_tokens, hidden_size]`.
    """
    num_tokens = hidden_states.shape[0]
    weights = torch.ones(num_tokens, 1, dtype=hidden_states.dtype, device=hidden_states.device)
    outputs = []
    for expert in range(experts.num_experts):
        index = torch.full((num_tokens, 1), expert, dtype=torch.long, device=hidden_states.device)
        outputs.append(experts(hidden_states, index, weights))
    return torch.stack(outputs)


class ExpertCapture:
    """Runs a model and hands each layer's all-experts outputs to an observer.

    The model's own forward pass is not changed: the extra expert calls happen beside it, on the same inputs.
    """

    def __init__(self, model: nn.Module, observe: Callable[[int, Tensor], None]) -> None:
        """Args:
        model: A Transformers MoE model in evaluation mode.
        observe: Called with a layer index and outputs `[num_experts, num_tokens, hidden_size]`, several times a layer.
        """
        self.model = model
        self._observe = observe
        self._mask: Tensor | None = None
        self._forced = False
        self.experts = find_expert_modules(model)
        for layer, module in self.experts.items():
            module.register_forward_pre_hook(self._hook(layer), with_kwargs=True)

    def _hook(self, layer: int) -> Callable:
        def before_experts(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self._forced or self._mask is None:
                return
            hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            tokens = hidden_states.reshape(-1, hidden_states.shape[-1])[self._mask]
            limit = max(4, min(_CHUNK_TOKENS, _CHUNK_ELEMENTS // (module.num_experts * tokens.shape[-1])))
            self._forced = True
            try:
                # Equal parts: a short last chunk would have no CKA estimate.
                for chunk in tokens.tensor_split(max(1, -(-tokens.shape[0] // limit))):
                    if chunk.shape[0]:
                        self._observe(layer, expert_outputs(module, chunk))
            finally:
                self._forced = False

        return before_experts

    @torch.inference_mode()
    def run(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """One forward pass.

        Args:
            input_ids: int64 `[num_sequences, sequence_length]`.
            attention_mask: Same shape; tokens with 0 are padding and do not count.
        """
        self._mask = attention_mask.bool().flatten()
        try:
            # The language-model head is not needed, but not every family lets it be left out.
            self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
        finally:
            self._mask = None
