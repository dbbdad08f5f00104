"""Forced routing gives each expert's own output, and padding does not count, on several model families."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from calibration_jobs.capture import ExpertCapture, expert_outputs, find_expert_modules
from conf.schema import ConfigError

SMALL = dict(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    pad_token_id=0,
)
CONFIGS = {
    "qwen3_moe": Qwen3MoeConfig(
        **SMALL, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8, decoder_sparse_step=1
    ),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=6, num_experts_per_tok=2),
    "olmoe": OlmoeConfig(**SMALL, num_experts=6, num_experts_per_tok=2),
}


def make(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    model.set_experts_implementation("grouped_mm")
    return model


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_forced_routing_is_the_expert_itself(name):
    experts = find_expert_modules(make(name))[1]
    hidden = torch.randn(9, 16)
    outputs = expert_outputs(experts, hidden)
    assert outputs.shape == (6, 9, 16)
    for expert in range(6):
        gate, up = functional.linear(hidden, experts.gate_up_proj[expert]).chunk(2, dim=-1)
        direct = functional.linear(experts.act_fn(gate) * up, experts.down_proj[expert])
        torch.testing.assert_close(outputs[expert], direct, atol=1e-6, rtol=1e-4)


def capture(model, ids, mask):
    seen = {}
    ExpertCapture(model, lambda layer, outputs: seen.setdefault(layer, []).append(outputs)).run(ids, mask)
    return {layer: torch.cat(parts, dim=1) for layer, parts in seen.items()}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_padding_does_not_count(name):
    ids = torch.randint(1, 50, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    padded = capture(make(name), ids, mask)
    changed = ids.clone()
    changed[0, 5:] = 0
    assert sorted(padded) == [0, 1]
    for layer, outputs in capture(make(name), changed, mask).items():
        assert outputs.shape == (6, 12, 16)
        torch.testing.assert_close(outputs, padded[layer])
    alone = capture(make(name), ids[:1, :5], mask[:1, :5])
    torch.testing.assert_close(alone[1], padded[1][:, :5], atol=1e-5, rtol=1e-4)


def test_model_output_is_unchanged():
    model = make("qwen3_moe")
    ids = torch.randint(1, 50, (2, 7))
    with torch.no_grad():
        before = model(ids).logits
        ExpertCapture(model, lambda layer, outputs: None)
        assert torch.equal(model(ids).logits, before)


def test_dense_model_is_refused():
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no experts module"):
        find_expert_modules(AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)))
