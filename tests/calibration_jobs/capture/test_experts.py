"""Capture on every supported family: what it captures of an expert is what the model's own forward computes."""

import pytest
import torch
import transformers
from torch import Tensor

from sere.calibration_jobs.capture.experts import ExpertsCall, find_expert_modules, intercept_experts, observe_experts
from sere.conf.errors import ConfigError

FAMILIES = [
    "qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe", "phimoe",
]  # fmt: skip
NUM_EXPERTS = 6
# Every family takes those of these settings that it knows.
SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=24,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=NUM_EXPERTS,
    num_local_experts=NUM_EXPERTS,
    n_routed_experts=NUM_EXPERTS,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=8,
    max_position_embeddings=64,
    sliding_window=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def make(family: str, **changes):
    torch.manual_seed(0)
    known = transformers.AutoConfig.for_model(family)
    settings = {key: value for key, value in {**SMALL, **changes}.items() if hasattr(known, key)}
    if "qk_rope_head_dim" in settings:  # only part of a head is rotated
        settings |= {"head_dim": settings["qk_rope_head_dim"], "num_key_value_heads": settings["num_attention_heads"]}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **settings))
    for parameter in model.parameters():
        if not parameter.any():  # gpt_oss starts some biases at zero, which would hide a lost bias
            torch.nn.init.normal_(parameter, std=0.1)
    if family != "llama":
        model.set_experts_implementation("grouped_mm")
    return model.eval()


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def all_outputs(model, one: dict[str, Tensor], block_tokens: int = 4) -> dict[int, Tensor]:
    seen: dict[int, Tensor] = {}
    num_tokens = int(one["attention_mask"].sum())

    def observe(layer: int, outputs: Tensor, tokens: Tensor) -> None:
        assert outputs.shape[1] == len(tokens) <= block_tokens
        seen.setdefault(layer, torch.full((NUM_EXPERTS, num_tokens, 32), torch.nan))[:, tokens] = outputs

    observe_experts(model, [one], observe, block_tokens=block_tokens)
    assert not any(outputs.isnan().any() for outputs in seen.values()), "every token once"
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_output_is_what_the_model_computes(family):
    """Token by token and expert by expert: routed to one expert alone, the model's own experts give the captured output."""
    model, one = make(family), batch()
    calls: list[ExpertsCall] = []

    def record(call: ExpertsCall) -> Tensor:
        calls.append(call)
        return call.run()

    with torch.inference_mode(), intercept_experts(model, record):
        model(**one, use_cache=False)
    captured = all_outputs(model, one)
    assert sorted(captured) == [call.layer for call in calls] == sorted(find_expert_modules(model))
    valid = one["attention_mask"].bool().flatten()
    model.set_experts_implementation("eager")
    for call in calls:
        outputs = captured[call.layer]
        assert outputs.shape == (NUM_EXPERTS, int(valid.sum()), 32)
        tokens = torch.arange(outputs.shape[1])
        mixed = torch.zeros_like(outputs[0])
        for slot in range(call.topk_ids.shape[1]):
            ids, weights = call.topk_ids[valid, slot], call.topk_weights[valid, slot, None]
            mixed += weights * outputs[ids, tokens]
            # The model's own forward with all weight on this slot: the expert the router chose, times its weight.
            alone = torch.zeros_like(call.topk_weights)
            alone[:, slot] = call.topk_weights[:, slot]
            with torch.inference_mode():
                own = call.module(call.hidden_states, call.topk_ids, alone)[valid]
            torch.testing.assert_close(weights * outputs[ids, tokens], own, atol=1e-5, rtol=1e-4)
        with torch.inference_mode():
            own = call.module(call.hidden_states, call.topk_ids, call.topk_weights)[valid]
        torch.testing.assert_close(mixed, own, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_observing_does_not_change_the_model(family):
    model, one = make(family), batch()
    with torch.inference_mode():
        before = model(**one, use_cache=False).logits
        with intercept_experts(model, lambda call: (call.all_experts(call.hidden_states), call.run())[1]):
            assert torch.equal(model(**one, use_cache=False).logits, before)
        assert torch.equal(model(**one, use_cache=False).logits, before)
    assert not any("forward" in vars(module) for module in find_expert_modules(model).values()), "taken away again"


def test_padding_does_not_count():
    one = batch()
    changed = {**one, "input_ids": torch.where(one["attention_mask"].bool(), one["input_ids"], 5)}
    model = make("qwen3_moe")
    padded, other = all_outputs(model, one), all_outputs(model, changed)
    alone = all_outputs(model, {key: value[:1, :6] for key, value in one.items()})
    for layer, outputs in padded.items():
        torch.testing.assert_close(outputs, other[layer])
        torch.testing.assert_close(outputs[:, :6], alone[layer], atol=1e-5, rtol=1e-4)


def test_model_without_experts_is_refused():
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no experts module"):
        find_expert_modules(make("llama"))


def test_two_experts_modules_in_a_layer_are_refused():
    model = make("qwen3_moe")
    model.model.layers[1].second = make("qwen3_moe").model.layers[0].mlp
    with pytest.raises(ConfigError, match="two experts modules in layer 1"):
        find_expert_modules(model)
