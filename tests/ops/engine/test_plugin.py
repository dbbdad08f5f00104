"""The plugin in real vLLM engines: what it changes, what it leaves alone, what it records."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from sere.ops.engine import assert_rerouting
from sere.ops.engine.counters import read_counters
from sere.ops.engine.state import ENGINE_STATES
from sere.ops.kernels.cpu import CompiledStep
from sere.ops.kernels.cuda import launched_step
from sere.ops.reference import DECODE, PADDING, PREFILL
from tests.ops.engine.engines import PROMPTS, core, engine, greedy, moe_layers, tokens
from tests.ops.engine.recording import Recording, check_against_reference
from tests.ops.kernels.shim import SANITIZERS, cuda_on_cpu, needs_compiler

pytestmark = pytest.mark.engine

SERE = {"policy": "sere", "metric": "cosine", "primary_top_k": 1, "threshold": 0.5}


@pytest.fixture(scope="module")
def without_plugin(tmp_path_factory) -> dict:
    """A process of vLLM that never heard of the plugin, but is asked to re-route: its greedy tokens, and the error for that."""
    code = """
        import json, sys
        from sere.ops.engine import assert_rerouting
        from tests.ops.engine.engines import PROMPTS, engine, greedy, tokens
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
        with engine({"policy": "random"}, fresh=True) as llm:
            assert not hasattr(MoERunner.__init__, "sere_original")
            found = {"tokens": tokens(llm.generate(PROMPTS, greedy(), use_tqdm=False))}
            try:
                assert_rerouting(llm)
            except RuntimeError as error:
                found["error"] = str(error)
            json.dump(found, open(sys.argv[1], "w"))
    """
    file = tmp_path_factory.mktemp("unpatched") / "found.json"
    environment = {**os.environ, "VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(file)], env=environment, check=True)
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def unpatched(without_plugin) -> list[list[int]]:
    return without_plugin["tokens"]


def test_absent_settings_change_nothing(unpatched):
    with engine() as llm:
        assert tokens(llm.generate(PROMPTS, greedy(), use_tqdm=False)) == unpatched
        with pytest.raises(RuntimeError, match="without a `sere` section: pass additional_config"):
            assert_rerouting(llm)
        assert not any(hasattr(runner, "sere_layer") for runner in moe_layers(llm).values())


def test_an_engine_without_the_plugin_is_told(without_plugin):
    assert "did not load the vLLM plugin sere: unset VLLM_PLUGINS or name sere in it" in without_plugin["error"]


def prompt_logprobs(llm, prompts):
    outputs = llm.generate(prompts, greedy(prompt_logprobs=0), use_tqdm=False)
    return [[next(iter(place.values())).logprob for place in output.prompt_logprobs if place is not None] for output in outputs]


def test_prompts_are_untouched(demo_artifact):
    """The prompts' log-probabilities are the same with and without re-routing, bit for bit where no decode row shares the
    step, and up to rounding where one does (other rows' experts change the shapes of the matrix products)."""
    with engine() as llm:
        alone, mixed = prompt_logprobs(llm, PROMPTS[:16]), prompt_logprobs(llm, PROMPTS)
    with engine({**SERE, "threshold": 0.0, "similarity": str(demo_artifact)}) as llm:
        assert prompt_logprobs(llm, PROMPTS[:16]) == alone
        for actual, expected in zip(prompt_logprobs(llm, PROMPTS), mixed, strict=True):
            assert actual == pytest.approx(expected, abs=1e-4)
    with engine({**SERE, "threshold": 0.0, "similarity": str(demo_artifact), "phase": "all"}) as llm:
        assert prompt_logprobs(llm, PROMPTS[:16]) != alone, "phase all does touch prompts"


@pytest.mark.parametrize(
    "settings",
    [{"policy": "none"}, {**SERE, "primary_top_k": 8, "threshold": 0.0}, {"policy": "top_k", "primary_top_k": 8}],
    ids=["none", "sere-all-slots", "top_k-all-slots"],
)
def test_neutral_settings_give_the_output_of_unpatched_vllm(unpatched, demo_artifact, settings, tmp_path):
    settings = {**settings, "stats_dir": str(tmp_path)}
    if settings["policy"] == "sere":
        settings["similarity"] = str(demo_artifact)
    with engine(settings) as llm:
        assert tokens(llm.generate(PROMPTS, greedy(), use_tqdm=False)) == unpatched
    for layer in read_counters(tmp_path):
        assert layer.counts["steps"] > 20
        assert layer.counts["rerouted_slots"] == layer.counts["critical_slots"] == 0
        assert layer.counts["active_experts_before"] == layer.counts["active_experts_after"] > 0


def test_ids_at_the_experts_are_the_references(unpatched, demo_artifact, tmp_path, monkeypatch):
    """Twenty prompts through sixteen places: prefill steps, decode steps and steps with both."""
    settings = {**SERE, "similarity": str(demo_artifact), "stats_dir": str(tmp_path)}
    with engine(settings) as llm:
        assert_rerouting(llm)
        assert_rerouting(llm.llm_engine)
        recording = Recording(llm, monkeypatch, experts=True)
        outputs = tokens(llm.generate(PROMPTS, greedy(), use_tqdm=False))
    rerouted = check_against_reference(recording, demo_artifact, primary_top_k=1, threshold=0.5)
    assert rerouted > 100
    assert outputs != unpatched
    assert len(recording.at_experts) == len(recording.steps)
    for (index, ids), (step_index, *_, new_ids) in zip(recording.at_experts, recording.steps, strict=True):
        assert index == step_index and torch.equal(ids, new_ids)

    # The counters, against the recording.
    for layer in read_counters(tmp_path):
        steps = [step for step in recording.steps if step[0] == layer.layer]
        rows = [int((roles == DECODE).sum()) for _, _, _, roles, _, _ in steps]
        left_alone = layer.counts["steps"] - layer.counts["rerouting_steps"]
        assert layer.counts["rerouting_steps"] == sum(n > 0 for n in rows)
        assert layer.counts["rerouted_slots"] == sum(int((s[2] != s[5]).sum()) for s in steps)
        if left_alone == 0:
            assert layer.counts["decode_rows"] == sum(rows)
        assert 0 < layer.counts["active_experts_after"] < layer.counts["active_experts_before"]


@needs_compiler
@pytest.mark.parametrize("policy", ["none", "sere", "random", "oea", "sere_t"])
def test_the_same_on_every_path(artifact_with_tables, policy, tmp_path):
    """The same engine three times: with compiled code, with torch's operations, and with the kernel (on the CPU) launched as on
    a GPU."""
    results = []
    for path in ("compiled", "torch", "kernel"):
        settings = {"policy": policy, "similarity": artifact_with_tables, "stats_dir": str(tmp_path / path)}
        with cuda_on_cpu(*SANITIZERS) as shims, engine(settings) as llm:
            for runner in moe_layers(llm).values():
                made = runner.sere_layer.policy
                assert isinstance(made.fast, CompiledStep)
                if path != "compiled":
                    arguments = made.rules, made.layer, made.similarity, made._tables
                    made.fast = launched_step(*arguments) if path == "kernel" else None
            outputs = tokens(llm.generate(PROMPTS, greedy(), use_tqdm=False))
            assert (shims.num_launches > 100) == (path == "kernel")
        results.append((outputs, read_counters(tmp_path / path)))
    assert results[0] == results[1] == results[2]
    assert results[0][1][0].counts["steps"] > 20


def test_nothing_to_do_costs_nothing(monkeypatch):
    """No counters asked for, and every slot votes: the layers and the roles are not touched."""
    with engine({"policy": "random", "primary_top_k": 8}) as llm:
        state = ENGINE_STATES[id(core(llm).vllm_config.compilation_config.static_forward_context)]
        assert not state.has_work
        monkeypatch.setattr(state.roles, "fill", lambda starts: pytest.fail("roles were filled"))
        llm.generate(PROMPTS[:4], greedy(), use_tqdm=False)


def test_random_and_top_k_run_and_save_experts(tmp_path):
    for policy in ("random", "top_k"):
        folder = tmp_path / policy
        with engine({"policy": policy, "primary_top_k": 2, "stats_dir": str(folder)}) as llm:
            llm.generate(PROMPTS, greedy(), use_tqdm=False)
        for layer in read_counters(folder):
            assert 0 < layer.counts["active_experts_after"] < layer.counts["active_experts_before"]
            assert layer.counts["critical_slots"] == 0


@pytest.mark.parametrize(("min_tokens", "max_tokens"), [(1, 1024), (6, 1024), (1, 12)])
def test_mixed_batches_follow_the_roles(demo_artifact, min_tokens, max_tokens, monkeypatch):
    """Chunked prefill beside decode: each step's roles are those that the scheduler's plan implies."""
    settings = {**SERE, "similarity": str(demo_artifact), "min_tokens": min_tokens, "max_tokens": max_tokens}
    with engine(settings, max_num_batched_tokens=24, max_num_seqs=8, max_model_len=128) as llm:
        recording = Recording(llm, monkeypatch, experts=True)
        scheduler = core(llm).scheduler
        plans, schedule = [], scheduler.schedule

        def planned(*args, **kwargs):
            output = schedule(*args, **kwargs)
            plans.append(dict(output.num_scheduled_tokens))
            return output

        monkeypatch.setattr(scheduler, "schedule", planned)
        long_prompts = [f"{prompt}{'x' * (7 * (i % 5))}" for i, prompt in enumerate(PROMPTS)]
        llm.generate(long_prompts, greedy(max_tokens=10), use_tqdm=False)

    plans = [plan for plan in plans if plan]
    first_layer = [step for step in recording.steps if step[0] == 0 and (step[3] != PADDING).any()]
    assert len(first_layer) == len(plans)
    kinds = set()
    for plan, (_, _, _, roles, _, _) in zip(plans, first_layer, strict=True):
        decode = sum(1 for count in plan.values() if count == 1)
        prefill = sum(count for count in plan.values() if count > 1)
        kinds.add((decode > 0, prefill > 0))
        if decode < min_tokens or decode + prefill > max_tokens:
            decode, prefill = 0, decode + prefill
        assert (int((roles == DECODE).sum()), int((roles == PREFILL).sum())) == (decode, prefill)
    assert {(True, True), (True, False)} <= kinds, "the workload has mixed and pure decode steps"
    check_against_reference(recording, demo_artifact, primary_top_k=1, threshold=0.5)


@pytest.mark.parametrize("policy", ["none", "sere"])
def test_compiled_engine(unpatched, demo_artifact, policy, monkeypatch):
    """torch.compile traces through the router on the CPU: the op must survive it and see every step."""
    settings = {**SERE, "policy": policy, "similarity": str(demo_artifact)}
    with engine(settings, enforce_eager=False) as llm:
        recording = Recording(llm, monkeypatch, experts=False)
        outputs = tokens(llm.generate(PROMPTS, greedy(), use_tqdm=False))
    assert {step[0] for step in recording.steps} == {0, 1, 2, 3}
    if policy == "none":
        agree = sum(a == b for a, b in zip(outputs, unpatched, strict=True))
        # Compiled kernels round differently from eager ones, so a near tie may fall the other way.
        assert agree >= len(PROMPTS) - 1
    else:
        assert check_against_reference(recording, demo_artifact, primary_top_k=1, threshold=0.5) > 100
        assert outputs != unpatched


def test_a_step_without_roles_is_an_error(monkeypatch):
    """As if a model runner had a way to run a step that the plugin does not see."""
    with engine({"policy": "random"}, fresh=True) as llm:
        state = ENGINE_STATES[id(core(llm).vllm_config.compilation_config.static_forward_context)]
        monkeypatch.setattr(state, "begin_step", lambda attn_metadata: None)
        with pytest.raises(RuntimeError, match=r"nothing was re-routed.*VLLM_USE_V2_MODEL_RUNNER=0"):
            llm.generate(PROMPTS[:1], greedy(), use_tqdm=False)
        state.query_start_loc = torch.tensor([0, 1, 2, 3, 4, 9], dtype=torch.int32)
        state.begin_replay()
        roles = [DECODE] * 4 + [PREFILL] * 5 + [PADDING]
        assert state.roles.roles[:10].tolist() == roles

        # A forward context made while a graph is being captured must not record the capture's roles in it.
        monkeypatch.undo()
        monkeypatch.setattr(state, "device", torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        state.begin_step(None)
        assert state.roles.roles[:10].tolist() == roles
        # A draft model's graph must not be replayed with the roles of the model's step.
        state.begin_draft_replay()
        assert not state.roles.roles.any() and not state.roles.step.any()
