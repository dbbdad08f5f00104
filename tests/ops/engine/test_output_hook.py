"""Compensation in real engines: what is added is the reference's, eager and compiled, and where it cannot be added is said."""

import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

from sere.conf.errors import ConfigError
from sere.conf.schema import RerouteConfig
from sere.ops.engine.output_hook import hook_output, refuse_output, share_of
from sere.ops.reference import DECODE, compensate_reference
from sere.ops.similarity import SimilarityArtifact
from tests.conftest import DEMO_MODEL
from tests.ops.engine.engines import PROMPTS, engine, greedy, moe_layers, tokens
from tests.ops.engine.recording import Recording

pytestmark = pytest.mark.engine


def record_compensation(llm, monkeypatch):
    """Each layer's calls: its index, output before, input, output after."""
    calls = []

    def patched(index, layer):
        original = layer.compensate

        def compensate(output, hidden_states):
            before = output.clone()
            compensated = original(output, hidden_states)
            calls.append((index, before, hidden_states.clone(), compensated.clone()))
            return compensated

        monkeypatch.setattr(layer, "compensate", compensate)

    for index, runner in moe_layers(llm).items():
        patched(index, runner.sere_layer)
    return calls


def check_steps(settings, recording, calls) -> int:
    """Every call is the reference's, of the step that its layer routed right before; returns decode rows compensated."""
    config, tables = RerouteConfig.from_dict(settings), SimilarityArtifact.load(settings["similarity"])
    assert [step[0] for step in recording.steps] == [call[0] for call in calls]
    compensated = 0
    for step, (index, output, hidden_states, result) in zip(recording.steps, calls, strict=True):
        _, weights, ids, roles, new_weights, new_ids = step
        known = tables.layer_tables(index)
        if not (roles == DECODE).any():
            assert torch.equal(result, output)
            continue
        expected = output + compensate_reference(
            config, hidden_states, (weights, ids), (new_weights, new_ids), known, roles=roles, layer=index
        )
        torch.testing.assert_close(result, expected.float(), rtol=1e-4, atol=1e-4)
        assert torch.equal(result[roles != DECODE], output[roles != DECODE])
        compensated += int((result != output).any(1).sum())
    return compensated


@pytest.mark.parametrize(
    "compensation",
    [{"rule": "mean"}, {"rule": "surrogate", "rank": 2}, {"rule": "surrogate", "rank": 3}],
    ids=["mean", "rank-2", "rank-3"],
)
@pytest.mark.parametrize("policy", ["sere_t", "sere"])
def test_what_is_added_is_the_references(artifact_with_tables, policy, compensation, monkeypatch):
    settings = {"policy": policy, "primary_top_k": 1, "similarity": artifact_with_tables, "compensation": compensation}
    with engine({**settings, "compensation": {"rule": "none"}}) as llm:
        plain = tokens(llm.generate(PROMPTS, greedy(8), use_tqdm=False))
    with engine(settings) as llm:
        recording, calls = Recording(llm, monkeypatch, experts=False), record_compensation(llm, monkeypatch)
        outputs = tokens(llm.generate(PROMPTS, greedy(8), use_tqdm=False))
    assert check_steps(settings, recording, calls) > 100
    assert outputs != plain, "what was added went on to the next layer"


def test_prompts_are_untouched(artifact_with_tables):
    settings = {"policy": "sere_t", "primary_top_k": 1, "similarity": artifact_with_tables, "compensation": {"rule": "mean"}}
    found = []
    for sere in ({"policy": "none"}, settings):
        with engine(sere) as llm:
            outputs = llm.generate(PROMPTS[:16], greedy(1, prompt_logprobs=0), use_tqdm=False)
            found.append([[place and next(iter(place.values())).logprob for place in out.prompt_logprobs] for out in outputs])
    assert found[0] == found[1]


def test_compiled_engine(artifact_with_tables, monkeypatch):
    """torch.compile traces through both hooks on the CPU: each layer's output is compensated by what that layer's routing left
    in the buffer that all share."""
    settings = {
        "policy": "sere_t",
        "primary_top_k": 2,
        "similarity": artifact_with_tables,
        "compensation": {"rule": "surrogate", "rank": 2},
    }
    with engine(settings) as llm:
        eager = tokens(llm.generate(PROMPTS, greedy(), use_tqdm=False))
    with engine(settings, enforce_eager=False, fresh=True) as llm:
        recording, calls = Recording(llm, monkeypatch, experts=False), record_compensation(llm, monkeypatch)
        compiled = tokens(llm.generate(PROMPTS, greedy(), use_tqdm=False))
    assert {call[0] for call in calls} == {0, 1, 2, 3}
    assert check_steps(settings, recording, calls) > 100
    # Compiled kernels round differently from eager ones, so a near tie may fall the other way.
    assert sum(a == b for a, b in zip(eager, compiled, strict=True)) >= len(PROMPTS) - 2


def test_an_output_that_is_not_compensated_is_an_error(artifact_with_tables, monkeypatch):
    """As if a graph without the hook were replayed."""
    settings = {"policy": "sere_t", "primary_top_k": 1, "similarity": artifact_with_tables}
    with engine(settings, fresh=True) as llm:
        experts = moe_layers(llm)[2].routed_experts
        monkeypatch.setattr(experts, "forward_modular", experts.forward_modular.sere_original)
        with pytest.raises(RuntimeError, match=r"output of layer 2 was not compensated.*compensation none"):
            llm.generate(PROMPTS, greedy(8), use_tqdm=False)


def test_tables_of_a_lower_rank(artifact_with_tables):
    settings = {"policy": "sere_t", "similarity": artifact_with_tables, "compensation": {"rule": "surrogate", "rank": 4}}
    with pytest.raises(ConfigError, match=r"must be at most 3"), engine(settings):
        pass


RANKS = """
    import json, sys

    if __name__ == "__main__":
        from vllm import LLM, SamplingParams

        model, num_ranks, sere, prompts = json.loads(sys.argv[1])
        llm = LLM(
            model=model, dtype="float32", tensor_parallel_size=num_ranks, max_num_seqs=16, enforce_eager=True,
            kv_cache_memory_bytes=1 << 27, disable_log_stats=True, additional_config={"sere": sere},
        )
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), use_tqdm=False)
        print("answers", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


@pytest.mark.long
def test_two_ranks_answer_as_one(artifact_with_tables, tmp_path):
    """Each adds half of the compensation before their outputs are summed."""
    (tmp_path / "script.py").write_text(textwrap.dedent(RANKS))
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    found = []
    for num_ranks, compensation in (
        (1, {"rule": "surrogate", "rank": 2}),
        (2, {"rule": "surrogate", "rank": 2}),
        (1, {"rule": "none"}),
    ):
        sere = {"policy": "sere_t", "primary_top_k": 1, "similarity": artifact_with_tables, "compensation": compensation}
        arguments = json.dumps([str(DEMO_MODEL), num_ranks, sere, PROMPTS])
        command = [sys.executable, "script.py", arguments]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
        found.append(json.loads(result.stdout.split("answers ")[1].splitlines()[0]))
    one, two, without = found
    agree = sum(a == b for a, b in zip(one, two, strict=True))
    # Sums over two ranks round differently, so a near tie may fall the other way.
    print(f"{agree} of {len(PROMPTS)} answers are the same")
    assert agree >= len(PROMPTS) - 3
    assert sum(a == b for a, b in zip(one, without, strict=True)) < agree, "compensation shows"


def layer(*, kernel=None, monolithic=False, on_input=False, config=None, **attributes):
    experts = SimpleNamespace(
        forward_modular=None, apply_router_weight_on_input=on_input, quant_method=SimpleNamespace(moe_kernel=kernel)
    )
    sizes = dict(hidden_dim=128, hidden_dim_unpadded=128, tp_size=1, ep_size=1, use_deferred_moe_finalize=False)
    return SimpleNamespace(
        routed_experts=experts,
        layer_name="model.layers.3.mlp.experts",
        is_monolithic=monolithic,
        moe_config=SimpleNamespace(**{**sizes, **(config or {})}),
        **attributes,
    )


@pytest.mark.parametrize(
    ("runner", "reason"),
    [
        (layer(monolithic=True), "chooses experts inside its kernel"),
        (layer(on_input=True), "applied to the experts' input"),
        (layer(routed_input_transform=torch.nn.Identity()), "latent space"),
        (layer(routed_output_transform=torch.nn.Identity()), "latent space"),
        (layer(config=dict(hidden_dim=256)), "works on 256 columns, the artifact's tables have 128"),
        (layer(config=dict(hidden_dim_unpadded=96)), "works on 128 columns"),
        (layer(config=dict(use_deferred_moe_finalize=True)), "leaves the sum over a row's experts"),
        (layer(kernel=SimpleNamespace(output_is_reduced=lambda: True)), "sums the output over ranks itself"),
    ],
)
def test_layers_that_cannot_be_compensated(runner, reason, monkeypatch):
    monkeypatch.setattr("sere.ops.engine.output_hook.num_ranks", lambda: 2)
    refuse_output(layer(), "sere_t", 128)
    with pytest.raises(ConfigError, match=rf"'sere_t' cannot compensate in model.layers.3.mlp.experts: .*{reason}.*none"):
        refuse_output(runner, "sere_t", 128)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_kernel_that_writes_over_its_input(in_place):
    """As in vLLM versions before 0.32: compensation is still given the input."""
    runner = layer(config=dict(disable_inplace=not in_place))
    runner.routed_experts.forward_modular = lambda x, **_: x.mul_(2) if in_place else x * 2
    given = []
    runner.sere_layer = SimpleNamespace(compensate=lambda output, hidden_states: given.append(hidden_states) or output + 1)
    hook_output(runner)
    hook_output(runner)
    output = runner.routed_experts.forward_modular(x=torch.full((2, 3), 5.0), topk_ids=None)
    assert torch.equal(output, torch.full((2, 3), 11.0))
    assert [state.unique().tolist() for state in given] == [[5.0]]


def test_names_exist_in_vllm():
    """A renamed attribute of vLLM's must not turn a refusal off."""
    from dataclasses import fields
    from inspect import getsource, signature

    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    assert next(iter(signature(RoutedExperts.forward_modular).parameters)) == "self"
    assert list(signature(RoutedExperts.forward_modular).parameters)[1] == "x"
    assert {"routed_input_transform", "routed_output_transform"} <= set(signature(MoERunner.__init__).parameters)
    assert "apply_router_weight_on_input" in signature(RoutedExperts.__init__).parameters
    assert {"hidden_dim", "hidden_dim_unpadded"} <= {field.name for field in fields(FusedMoEConfig)}
    assert all(hasattr(FusedMoEConfig, name) for name in ("tp_size", "ep_size", "use_deferred_moe_finalize"))
    assert "output_is_reduced" in getsource(MoERunner._fused_output_is_reduced.fget)


def test_shares_of_ranks(monkeypatch):
    monkeypatch.setattr("sere.ops.engine.output_hook.num_ranks", lambda: 4)
    assert share_of(layer()) == 1, "whole experts on every rank: nothing is summed"
    assert share_of(layer(config=dict(tp_size=4))) == share_of(layer(config=dict(ep_size=4))) == 1 / 4
