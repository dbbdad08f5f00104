"""The styles of small model that the training script makes: their shapes, their tasks, and how their experts are balanced.

`bundled` is the shipped one. The others are made to see whether what holds for it holds elsewhere: `v3` routes as
DeepSeek-V3 does, `wide` has few and large experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tasks import CONTEXT_LENGTH, TASKS
from torch.nn import functional
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# What all styles share.
_COMMON = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": CONTEXT_LENGTH,
    "initializer_range": 0.05,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
# Those of which the bundled model had learnt most in the first third of its training.
_EASY_TASKS = ("sums", "sort", "reverse", "next", "max", "seq", "zip")


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """One kind of model: `config` makes its configuration from the vocabulary's size."""

    config: Callable[[int], PreTrainedConfig]
    model: type[PreTrainedModel]
    tasks: tuple[str, ...]
    text_rows: int  # Rows of library text a step.
    balance: float  # Weight of the load-balancing loss.
    bias_step: float = 0.0  # How far the selection bias moves a step, at the full learning rate.


def _qwen3_moe(**shape: int) -> Callable[[int], PreTrainedConfig]:
    return lambda vocab_size: Qwen3MoeConfig(vocab_size=vocab_size, **shape, **_COMMON)


def _glm4_moe(**shape: float) -> Callable[[int], PreTrainedConfig]:
    # One group of experts is no grouping; the heads that predict further tokens are left out.
    ungrouped = {"n_group": 1, "topk_group": 1, "num_mtp_layers": 0, "use_qk_norm": True}
    return lambda vocab_size: Glm4MoeConfig(vocab_size=vocab_size, **ungrouped, **shape, **_COMMON)


STYLES: dict[str, Style] = {
    "bundled": Style(
        config=_qwen3_moe(num_hidden_layers=4, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=64),
        model=Qwen3MoeForCausalLM,
        tasks=tuple(TASKS),
        text_rows=8,
        balance=0.1,
    ),
    "v3": Style(
        config=_glm4_moe(
            num_hidden_layers=4,
            first_k_dense_replace=1,
            n_routed_experts=32,
            n_shared_experts=1,
            num_experts_per_tok=4,
            moe_intermediate_size=64,
            routed_scaling_factor=2.5,
        ),
        model=Glm4MoeForCausalLM,
        tasks=_EASY_TASKS,
        text_rows=4,
        balance=0.0,
        bias_step=0.003,
    ),
    "wide": Style(
        config=_qwen3_moe(num_hidden_layers=3, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=256),
        model=Qwen3MoeForCausalLM,
        tasks=_EASY_TASKS,
        text_rows=4,
        balance=0.1,
    ),
}


def make_model(style: Style, tokenizer_size: int) -> PreTrainedModel:
    model = style.model(style.config(tokenizer_size))
    model.set_experts_implementation("grouped_mm")
    return model


class RouterWatch:
    """Collects what the router of every MoE layer does during one forward pass.

    `routed` holds `(logits, ids)` of each MoE layer in order: float `[num_tokens, num_experts]`, int64
    `[num_tokens, top_k]`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.routed: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
        self.num_experts = self.gates[0].num_experts
        for gate in self.gates:
            gate.register_forward_hook(self._collect)
        self._counts = torch.zeros(len(self.gates), self.num_experts)

    def _collect(self, module: torch.nn.Module, args: tuple, output: tuple) -> None:
        weight = module.weight
        self.routed.append((functional.linear(args[0].reshape(-1, weight.shape[1]), weight), output[2]))

    def load(self, ids: torch.Tensor) -> torch.Tensor:
        """Share of the slots each expert gets times the number of experts: 1 is fair. Float `[num_experts]`."""
        return torch.bincount(ids.flatten(), minlength=self.num_experts).float() * (self.num_experts / ids.numel())

    def loads(self) -> torch.Tensor:
        """`load` of each MoE layer, float `[num_moe_layers, num_experts]`; forgets what was collected."""
        loads = torch.stack([self.load(ids) for _, ids in self.routed])
        self.routed.clear()
        return loads

    def balance_loss(self) -> torch.Tensor:
        """Mean over layers of the Switch Transformer balance loss (1 when balanced); forgets what was collected."""
        scores = [logits.float().softmax(-1).mean(0) for logits, _ in self.routed]
        loads = self.loads()
        self._counts += loads
        return (loads * torch.stack(scores)).sum(1).mean()

    @torch.no_grad()
    def move_bias(self, step: float) -> None:
        """Raise the selection bias of experts with less than their fair load since the last call, lower the others'.

        Balancing without an auxiliary loss (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
        """
        for gate, counts in zip(self.gates, self._counts, strict=True):
            gate.e_score_correction_bias += step * (counts.mean() - counts).sign()
        self._counts.zero_()
