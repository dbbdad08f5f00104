"""Every reason to refuse is an error at engine start, with the remedy in the message."""

import contextlib
import dataclasses
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sere.conf.errors import ConfigError
from sere.conf.schema import RerouteConfig
from sere.ops.engine.checks import refuse_engine_modes, refuse_router
from sere.ops.engine.plugin import register
from sere.ops.engine.state import ENGINE_STATES
from sere.ops.kernels.compile import compiled
from sere.ops.model_digest import model_digest
from sere.ops.similarity import SimilarityArtifact
from tests.conftest import DEMO_MODEL
from tests.ops.engine.engines import core, end_engine, engine, moe_layers

pytestmark = pytest.mark.engine


def changed_artifact(path, source, *, manifest=None, drop_layer=None):
    loaded = SimilarityArtifact.load(source)
    values = {**loaded.manifest, **(manifest or {})}
    matrices = dict(loaded.matrices)
    if drop_layer is not None:
        values["layers"] = [layer for layer in values["layers"] if layer != drop_layer]
        matrices = {key: matrix for key, matrix in matrices.items() if key[0] != drop_layer}
    return SimilarityArtifact(matrices, values).save(path)


def start(settings, message, **arguments):
    """What the plugin does when an engine starts; with arguments, or if none runs, that is a start."""
    with pytest.raises(ConfigError, match=message), engine(settings, **arguments):
        pass


@pytest.fixture
def running():
    """An engine to try settings on: starts cost seconds."""
    with engine({"policy": "none"}):
        pass


def test_settings(running, demo_artifact):
    start({"policy": "sere"}, "needs similarity")
    start({"policy": "random", "primary_top_k": 9}, r"between 1 and the model's top_k \(8\), got 9")
    start({"policy": "random", "threshhold": 0.5}, "unknown key 'threshhold'.*did you mean 'threshold'")
    start({"policy": "sere", "similarity": str(demo_artifact), "metric": "cka"}, "no metric 'cka': it has cosine")


def test_artifacts(running, demo_artifact, tmp_path):
    start({"similarity": str(tmp_path / "none")}, "no similarity artifact at")
    missing = changed_artifact(tmp_path / "missing", demo_artifact, drop_layer=2)
    start({"similarity": str(missing)}, r"no matrix for layer 2: it has \[0, 1, 3\]")
    other = changed_artifact(tmp_path / "other", demo_artifact, manifest={"model": {"name": "another", "digest": "0" * 64}})
    start({"similarity": str(other)}, "computed from other weights")
    tensors = load_file(demo_artifact)
    from safetensors import safe_open

    with safe_open(demo_artifact, framework="pt") as opened:
        metadata = opened.metadata()
    tensors["layers.1.cosine"] = torch.eye(64)
    save_file(tensors, tmp_path / "identity", metadata=metadata)
    start({"similarity": str(tmp_path / "identity")}, "layer 1 is the identity")


def test_a_hub_model_is_known_by_its_commit_and_by_its_files_once_they_are_here(running, demo_artifact, tmp_path, monkeypatch):
    """As vLLM has it: a hub name and a revision in the place of a folder, files only when weights are loaded."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshots, commit = tmp_path / "cache" / "models--org--moe" / "snapshots", "a" * 40
    right, wrong = model_digest(DEMO_MODEL), "0" * 64
    artifacts = {
        name: {"similarity": str(changed_artifact(tmp_path / name, demo_artifact, manifest={"model": {"name": name, **model}}))}
        for name, model in {
            "of-commit": {"digest": wrong, "commit": commit},
            "of-another": {"digest": right, "commit": "b" * 40},
            "of-files": {"digest": right},
            "of-other-files": {"digest": wrong},
            "of-nothing": {"digest": None},
        }.items()
    }
    with engine({"policy": "none"}) as llm:
        monkeypatch.setattr(core(llm).vllm_config.model_config, "model", "org/moe")
        monkeypatch.setattr(core(llm).vllm_config.model_config, "revision", commit)
    with engine(artifacts["of-commit"]):
        pass
    start(artifacts["of-another"], rf"other weights \(of-another.*model_revision={'b' * 40}")
    for name in ("of-files", "of-other-files", "of-nothing"):
        start(artifacts[name], rf"whether the artifact \({name}.*commit {commit}\) cannot be known.*check_model to false")
    with engine({**artifacts["of-nothing"], "check_model": False}):
        pass
    snapshots.mkdir(parents=True)
    (snapshots / commit).symlink_to(DEMO_MODEL)
    for name in ("of-commit", "of-another", "of-files"):
        with engine(artifacts[name]):
            pass
    start(artifacts["of-other-files"], "computed from other weights")
    start(artifacts["of-nothing"], "cannot be known")


def test_other_weights_are_allowed_on_request(running, demo_artifact, tmp_path):
    other = changed_artifact(tmp_path / "other", demo_artifact, manifest={"model": {"name": "another", "digest": "0" * 64}})
    with engine({"similarity": str(other), "check_model": False}):
        pass


def test_a_router_whose_scores_are_not_known(running, demo_artifact, monkeypatch):
    """Policies that need scores are refused by name; those that work from ids go on."""
    with engine({"policy": "oea"}) as llm:
        assert moe_layers(llm)[2].sere_layer.policy.layer.scoring.function == "softmax"
        router = moe_layers(llm)[2].router

    def per_expert_scale(hidden_states, gating_output, topk, renormalize):
        weights, ids = gating_output.softmax(-1).topk(topk)
        return weights * (1 + ids % 2), ids

    monkeypatch.setattr(router, "custom_routing_function", per_expert_scale)
    for settings in ({"policy": "oea"}, {"policy": "xshare", "votes": {"budget": 9}}):
        start(settings, r"layers\.2\..*routes with CPURouter with .*per_expert_scale.*use policy sere")
    with engine({"policy": "sere", "similarity": str(demo_artifact)}):
        pass


def test_monolithic_backend(running, monkeypatch):
    """No CPU backend for unquantised experts is out of reach any more, so what the checks ask of vLLM is set."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    monkeypatch.setattr(MoERunner, "is_monolithic", property(lambda self: True))
    monkeypatch.setattr("sere.ops.engine.checks.self_selecting_experts", lambda runner: None)
    start({"policy": "random"}, r"routes inside its kernel.*moe_backend='triton'.*vLLM 0\.30")


def test_reason_is_left_for_other_processes(tmp_path):
    start({"policy": "random", "primary_top_k": 9, "stats_dir": str(tmp_path)}, "got 9", fresh=True)
    assert not ENGINE_STATES
    assert ["got 9" in file.read_text() for file in tmp_path.glob("*.refused")] == [True]


def test_model_without_moe_layers(tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=258, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=256)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path)
    start({"policy": "random"}, "has no MoE layer that routes through", model=str(tmp_path))


def fake_config(fast_prefill=False, **parallel):
    defaults = dict(
        data_parallel_size=1,
        use_sequence_parallel_moe=False,
        prefill_context_parallel_size=1,
        use_ubatching=False,
        enable_dbo=False,
    )
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**{**defaults, **parallel}),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=fast_prefill),
    )


def test_batch_invariant_mode(monkeypatch):
    """vLLM's CPU platform refuses the mode before any layer is made; on a GPU this check is the one that speaks."""
    # While an engine runs vLLM goes by the environment of its start.
    end_engine()
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ConfigError, match="unset VLLM_BATCH_INVARIANT"):
        refuse_engine_modes(fake_config(), RerouteConfig(policy="random"), torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(data_parallel_size=2), "data_parallel_size=2.*engine.num_replicas"),
        (dict(use_sequence_parallel_moe=True), "sequence-parallel MoE"),
        (dict(prefill_context_parallel_size=2), "prefill_context_parallel_size to 1"),
        (dict(enable_dbo=True), "enable_dbo to false"),
        (dict(fast_prefill=True), "kv_sharing_fast_prefill to false"),
    ],
)
def test_modes_that_hide_the_roles(change, message):
    config = RerouteConfig(policy="random")
    refuse_engine_modes(fake_config(), config, torch.device("cpu"))
    with pytest.raises(ConfigError, match=message):
        refuse_engine_modes(fake_config(**change), config, torch.device("cpu"))


def test_names_of_the_modes_exist_in_vllm():
    """A renamed field of vLLM's must not turn a refusal off."""
    from vllm.config import CacheConfig, ParallelConfig
    from vllm.v1.core.sched.output import SchedulerOutput

    names = {field.name for field in dataclasses.fields(ParallelConfig)}
    assert {"data_parallel_size", "prefill_context_parallel_size", "enable_dbo"} <= names
    assert "kv_sharing_fast_prefill" in {field.name for field in dataclasses.fields(CacheConfig)}
    assert isinstance(ParallelConfig.use_sequence_parallel_moe, property)
    assert "total_num_scheduled_tokens" in {field.name for field in dataclasses.fields(SchedulerOutput)}


def test_v2_model_runner_is_what_the_plugin_wraps():
    """Read from the source: importing that runner needs more than a CPU machine has in some vLLM versions."""
    import vllm

    folder = Path(vllm.__file__).parent / "v1" / "worker" / "gpu"
    runner, graphs = ((folder / name).read_text() for name in ("model_runner.py", "cudagraph_utils.py"))
    assert re.search(r"^class GPUModelRunner\b.*?^    def prepare_attn\(\s*self, input_batch: InputBatch", runner, re.M | re.S)
    assert "self.cudagraph_manager.run_fullgraph(" in runner and "self.cudagraph_manager = ModelCudaGraphManager(" in runner
    run_fullgraph = r".*?^    def run_fullgraph\(.*?^        super\(\)\.run_fullgraph\(desc\)"
    assert re.search(r"^class ModelCudaGraphManager\(CudaGraphManager\):" + run_fullgraph, graphs, re.M | re.S)
    # Draft models' managers replay through the same function, and one that has its own calls it.
    for file in (folder / "spec_decode").rglob("*.py"):
        text = file.read_text()
        managers = re.findall(r"^class \w*CudaGraphManager\((\w*)\)", text, re.M)
        assert set(managers) <= {"CudaGraphManager"}, file
        assert text.count("    def run_fullgraph(") == text.count("super().run_fullgraph("), file


def test_v2_replays_of_the_model_and_of_drafts(monkeypatch):
    """The model's graphs get the roles of the step, a draft model's graphs get none."""
    from vllm.platforms import current_platform

    cudagraph_utils = pytest.importorskip("vllm.v1.worker.gpu.cudagraph_utils")
    model_runner = pytest.importorskip("vllm.v1.worker.gpu.model_runner")
    base = cudagraph_utils.CudaGraphManager
    calls = []

    def run_fullgraph(self, desc):
        calls.append(desc)

    monkeypatch.setattr(base, "run_fullgraph", run_fullgraph)
    # Set to itself, so that it is put back.
    monkeypatch.setattr(model_runner.GPUModelRunner, "prepare_attn", model_runner.GPUModelRunner.prepare_attn)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    register()

    class DraftManager(base):
        def __init__(self):
            pass

    class ModelManager(cudagraph_utils.ModelCudaGraphManager):
        def __init__(self):
            self.is_last_pp_rank, self.intermediate_tensors = False, torch.zeros(2)

    layers = {}
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    state = SimpleNamespace(begin_replay=lambda: calls.append("roles"), begin_draft_replay=lambda: calls.append("no roles"))
    monkeypatch.setitem(ENGINE_STATES, id(layers), state)
    for manager, roles in ((ModelManager(), "roles"), (DraftManager(), "no roles")):
        manager.vllm_config = config
        step = SimpleNamespace(num_tokens=1)
        calls.clear()
        manager.run_fullgraph(step)
        assert calls == [roles, step]


def test_device_without_a_kernel():
    for policy, refused in (("random", True), ("sere", True), ("none", False), ("top_k", False)):
        config = RerouteConfig(policy=policy, similarity="x")
        refuse_engine_modes(fake_config(), config, torch.device("cuda"))
        if refused:
            with pytest.raises(ConfigError, match="no kernel for xpu"):
                refuse_engine_modes(fake_config(), config, torch.device("xpu"))
        else:
            refuse_engine_modes(fake_config(), config, torch.device("xpu"))


def test_gpu_without_cupy(monkeypatch):
    """The error a GPU engine starts with where CuPy is missing, or NVRTC is."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    compile_fresh = compiled.__wrapped__
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ConfigError, match=r"needs CuPy.*pip install 'cupy-cuda13x\[ctk\]"):
        compile_fresh("reroute.cu", "sere_reroute", (), 0)

    class NoNvrtc:
        class cuda:
            Device = staticmethod(lambda index: contextlib.nullcontext())

        @staticmethod
        def RawModule(**arguments):
            raise RuntimeError("CuPy failed to load libnvrtc.so.13")

    monkeypatch.setitem(sys.modules, "cupy", NoNvrtc)
    with pytest.raises(ConfigError, match=r"could not be compiled.*libnvrtc.so.13.*pip install 'cupy-cuda13x"):
        compile_fresh("reroute.cu", "sere_reroute", (), 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ConfigError, match=r"compute capability 8\.0.*Tesla T4 has 7\.5"):
        compile_fresh("reroute.cu", "sere_reroute", (), 0)


def test_routers_that_cannot_be_followed():
    class ZeroExpertRouter:
        def _compute_routing(self):
            pass

    fused = SimpleNamespace(_compute_routing=None, num_fused_shared_experts=1)
    for router, message in (
        (object(), "cannot be followed"),
        (ZeroExpertRouter(), "zero-computation"),
        (fused, "shared experts together"),
    ):
        with pytest.raises(ConfigError, match=message):
            refuse_router(SimpleNamespace(router=router, layer_name="model.layers.0.mlp.experts"))
