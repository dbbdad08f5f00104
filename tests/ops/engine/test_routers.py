"""What vLLM's own router classes answer decides how they are followed, or that they are not."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.conf.errors import ConfigError
from sere.ops.engine.routers import ask_router, assumptions
from tests.examples import examples

pytestmark = pytest.mark.engine

NUM_EXPERTS, TOP_K = 32, 4


def ask(router):
    return ask_router(
        router,
        router._compute_routing,
        layer_name="model.layers.3.mlp.experts",
        num_experts=NUM_EXPERTS,
        hidden_size=16,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )


def cpu_router(**arguments):
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    return CPURouter(**{"top_k": TOP_K, "global_num_experts": NUM_EXPERTS, **arguments})


def grouped_router(**arguments):
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter

    return GroupedTopKRouter(top_k=TOP_K, global_num_experts=NUM_EXPERTS, **arguments)


def described(scoring):
    return scoring.function, scoring.bias is not None, scoring.num_groups, scoring.groups_kept, scoring.group_score


@settings(max_examples=examples(12), deadline=None)
@given(
    st.sampled_from(["softmax", "sigmoid"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1.0, 2.5]),
    st.sampled_from([(1, 1), (4, 2), (8, 3), (4, 4)]),
    st.integers(0, 9),
)
def test_grouped_routers(function, renormalize, biased, factor, groups, seed):
    """DeepSeek-V2 and V3 on the CPU: groups by their best expert or, where there is a bias, by their best two."""
    bias = torch.randn(NUM_EXPERTS, generator=torch.Generator().manual_seed(seed)) * 0.3 if biased else None
    router = cpu_router(
        use_grouped_topk=True,
        num_expert_group=groups[0],
        topk_group=groups[1],
        scoring_func=function,
        renormalize=renormalize,
        routed_scaling_factor=factor,
        e_score_correction_bias=bias,
    )
    found = ask(router)
    assert found.function == function and (found.bias is not None) == biased
    if groups[1] < groups[0]:
        assert described(found)[2:] == (*groups, "top2" if biased else "max")
    else:
        assert found.num_groups == 1
    if biased:
        assert torch.equal(found.bias, bias)


@pytest.mark.parametrize("renormalize", [True, False])
def test_plain_softmax(renormalize):
    assert described(ask(cpu_router(renormalize=renormalize))) == ("softmax", False, 1, 1, "max")


def test_the_router_of_gpus_with_groups(monkeypatch):
    """Its function, without the compilation that vLLM wraps it in."""
    from vllm.model_executor.layers.fused_moe.router import grouped_topk_router

    monkeypatch.setattr(grouped_topk_router, "grouped_topk", grouped_topk_router.grouped_topk._torchdynamo_orig_callable)
    bias = torch.linspace(-0.5, 0.5, NUM_EXPERTS)
    for function, added, score in (("softmax", None, "max"), ("sigmoid", bias, "top2")):
        router = grouped_router(num_expert_group=4, topk_group=2, scoring_func=function, e_score_correction_bias=added)
        assert described(ask(router)) == (function, added is not None, 4, 2, score)


def test_the_router_of_gpus_with_a_bias(monkeypatch):
    """Its kernels are not built for the CPU; the same in torch stands in for them."""
    from vllm.model_executor.layers.fused_moe.router import fused_topk_bias_router, fused_topk_router

    def kernel(function, weights, ids, _, logits, renormalize, bias=None, factor=1.0, **kwargs):
        scores = logits.softmax(-1) if function == "softmax" else logits.sigmoid()
        ids.copy_((scores if bias is None else scores + bias).topk(ids.shape[1]).indices)
        chosen = scores.gather(1, ids.long())
        weights.copy_((chosen / chosen.sum(1, keepdim=True) if renormalize else chosen) * factor)

    for module in (fused_topk_bias_router, fused_topk_router):
        for function in ("softmax", "sigmoid"):
            monkeypatch.setattr(module.ops, f"topk_{function}", partial(kernel, function))
    bias = torch.linspace(-0.5, 0.5, NUM_EXPERTS)
    sizes = dict(top_k=TOP_K, global_num_experts=NUM_EXPERTS)
    for function in ("softmax", "sigmoid"):
        for renormalize in (True, False):
            kind = dict(renormalize=renormalize, scoring_func=function)
            router = fused_topk_bias_router.FusedTopKBiasRouter(
                **sizes, **kind, e_score_correction_bias=bias, routed_scaling_factor=2.5
            )
            assert described(ask(router)) == (function, True, 1, 1, "max")
            assert described(ask(fused_topk_router.FusedTopKRouter(**sizes, **kind)))[:2] == (function, False)


def test_custom_functions_that_are_scores():
    """Cohere's is sigmoid, and so is Llama 4's: with one expert a row its weight tells sigmoid from softmax."""
    from vllm.model_executor.models.cohere2_moe import token_choice_with_bias
    from vllm.model_executor.models.llama4 import Llama4MoE

    for renormalize in (True, False):
        router = cpu_router(custom_routing_function=token_choice_with_bias, renormalize=renormalize)
        assert ask(router).function == "sigmoid"
    assert ask(cpu_router(top_k=1, custom_routing_function=Llama4MoE.custom_routing_function)).function == "sigmoid"


def test_functions_of_no_known_kind_are_refused_by_name():
    from vllm.model_executor.models.gemma4 import gemma4_routing_function_torch
    from vllm.model_executor.models.phimoe import phimoe_routing_function

    def gemma4(hidden_states, gating_output, topk, renormalize):
        return gemma4_routing_function_torch(gating_output, topk, torch.linspace(0.5, 2, NUM_EXPERTS))

    def of_the_input(hidden_states, gating_output, topk, renormalize):
        return gating_output.softmax(-1).roll(1, 0).topk(topk)

    def scaled_by_row(hidden_states, gating_output, topk, renormalize):
        weights, ids = gating_output.softmax(-1).topk(topk)
        return weights * torch.linspace(0.5, 1, len(ids)).unsqueeze(1), ids

    for function in (gemma4, of_the_input, scaled_by_row):
        message = rf"model.layers.3.mlp.experts routes with CPURouter with .*{function.__name__}.*use policy sere"
        with pytest.raises(ConfigError, match=message):
            ask(cpu_router(custom_routing_function=function))
    with pytest.raises(ConfigError, match="phimoe"):
        ask(cpu_router(top_k=2, custom_routing_function=phimoe_routing_function))


def test_what_cannot_be_asked_is_refused():
    def broken(hidden_states, gating_output, topk, renormalize):
        raise AttributeError("no topk_ids")

    with pytest.raises(ConfigError, match="cannot be asked: AttributeError: no topk_ids"):
        ask(cpu_router(custom_routing_function=broken))
    table = torch.zeros(8, TOP_K, dtype=torch.int32)
    with pytest.raises(ConfigError, match="it chooses by token"):
        ask(cpu_router(scoring_func="sqrtsoftplus", hash_indices_table=table))


def test_what_a_router_says_comes_first():
    said = SimpleNamespace(scoring_func="sigmoid", e_score_correction_bias=torch.zeros(8), num_expert_group=2, topk_group=1)
    assert described(next(assumptions(said, 8))) == ("sigmoid", True, 2, 1, "top2")
    assert [described(found) for found in assumptions(object(), 8)] == [
        ("softmax", False, 1, 1, "max"),
        ("sigmoid", False, 1, 1, "max"),
    ]
