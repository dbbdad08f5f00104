"""The vLLM plugin: re-routes the MoE layers of an engine whose `additional_config` has a `sere` section.

vLLM calls `register` in every process (entry point group `vllm.general_plugins`). It wraps a few functions of vLLM, each of
which does nothing more than before unless the engine's configuration asks for re-routing:

    MoERunner.__init__                         a policy per layer, which follows its router and, to compensate, its experts
    BaseModelLoader.load_model                 the same for experts that select themselves (vLLM's CPU backend before 0.30)
    forward_context.create_forward_context     the rows' roles, once per step
    WorkerWrapperBase.initialize_from_config   routers are asked how they score; the last checks before the engine is up
    WorkerWrapperBase.execute_model, shutdown  counters start at the first real step and are flushed; a step whose roles
                                               nobody set is an error
    WorkerWrapperBase.sere_status              new: what `assert_rerouting` asks
    gpu.GPUModelRunner.prepare_attn,           the rows' roles, for the V2 model runner, which replays full CUDA graphs without
    gpu.CudaGraphManager.run_fullgraph         a forward context; those of draft models too, whose rows are none of the step's

router_hook.py and output_hook.py say what becomes of a layer. Its policy finds it by name through vLLM's forward context or, on
a GPU, at graph capture: there everything a step needs is on the device.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sere.conf.errors import ConfigError
from sere.ops.engine.checks import self_selecting_experts
from sere.ops.engine.layer import ATTRIBUTE, LayerState
from sere.ops.engine.output_hook import hook_output
from sere.ops.engine.router_hook import follow, follow_router
from sere.ops.engine.state import ENGINE_STATES, EngineState
from sere.ops.engine.status import STATUS_METHOD


def attach(runner: Any, layer: LayerState) -> None:
    """Have a `MoERunner` follow a layer's policy, or another one than before."""
    object.__setattr__(runner, ATTRIBUTE, layer)
    follow_router(runner)
    if layer.policy.rules.compensation.rule != "none" and hasattr(runner.routed_experts, "forward_modular"):
        hook_output(runner)


def _settings(vllm_config: Any) -> dict[str, Any] | None:
    additional = vllm_config.additional_config
    return additional.get("sere") if isinstance(additional, dict) else None


def _key(vllm_config: Any) -> int:
    # Copies of an engine's configuration share this dict, which vLLM itself uses to find layers by name.
    return id(vllm_config.compilation_config.static_forward_context)


@contextmanager
def _refusing(vllm_config: Any) -> Iterator[None]:
    """Forget an engine that is refused, and write why into `stats_dir`: from a worker process, vLLM passes on only that the
    engine did not start."""
    try:
        yield
    except ConfigError as error:
        ENGINE_STATES.pop(_key(vllm_config), None)
        stats_dir = (_settings(vllm_config) or {}).get("stats_dir")
        if stats_dir:
            folder = Path(stats_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{os.getpid()}.refused").write_text(str(error))
        raise


def _status(worker: Any) -> dict[str, Any]:
    state = ENGINE_STATES.get(_key(worker.vllm_config))
    return state.status() if state is not None else {"policy": None, "num_layers": 0}


def _wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    original = getattr(owner, name)
    if not hasattr(original, "sere_original"):
        wrapper: Any = functools.wraps(original)(make(original))
        wrapper.sere_original = original
        setattr(owner, name, wrapper)


def register() -> None:
    """Wrap vLLM's functions; calling it again does nothing. Entry point `vllm.general_plugins`."""
    from vllm import forward_context
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.platforms import current_platform
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    def make_init(original: Callable) -> Callable:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            vllm_config = get_current_vllm_config()
            settings = _settings(vllm_config)
            if settings is None:
                return
            with _refusing(vllm_config):
                state = ENGINE_STATES.get(_key(vllm_config))
                if state is None:
                    state = ENGINE_STATES[_key(vllm_config)] = EngineState(settings, vllm_config)
                layer = state.add_layer(self)
            attach(self, layer)

        return init

    def make_load(original: Callable) -> Callable:
        def load_model(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
            model = original(self, vllm_config, *args, **kwargs)
            if _settings(vllm_config) is not None:
                for runner in vllm_config.compilation_config.static_forward_context.values():
                    experts = self_selecting_experts(runner) if hasattr(runner, ATTRIBUTE) else None
                    if experts is not None and not hasattr(experts._select_experts, "sere_original"):
                        experts._select_experts = follow(experts._select_experts, runner)
            return model

        return load_model

    def make_create(original: Callable) -> Callable:
        def create_forward_context(attn_metadata: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
            if _settings(vllm_config) is not None and (state := ENGINE_STATES.get(_key(vllm_config))) is not None:
                state.begin_step(attn_metadata)
            return original(attn_metadata, vllm_config, *args, **kwargs)

        return create_forward_context

    def make_initialize(original: Callable) -> Callable:
        def initialize_from_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            settings = _settings(self.vllm_config)
            if settings is not None:
                with _refusing(self.vllm_config):
                    state = ENGINE_STATES.get(_key(self.vllm_config))
                    if state is None:
                        # No MoE layer was made: let the settings speak first, then that.
                        state = ENGINE_STATES[_key(self.vllm_config)] = EngineState(settings, self.vllm_config)
                    state.finish_start(self.vllm_config)
            return original(self, *args, **kwargs)

        return initialize_from_config

    def make_execute(original: Callable) -> Callable:
        def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
            state = ENGINE_STATES.get(_key(self.vllm_config))
            if state is None:
                return original(self, *args, **kwargs)
            state.serve()
            num_steps_begun = state.num_steps_begun
            result = original(self, *args, **kwargs)
            scheduled = args[0] if args else kwargs["scheduler_output"]
            if scheduled.total_num_scheduled_tokens > 0 and state.has_work and state.num_steps_begun == num_steps_begun:
                raise RuntimeError(
                    "SERE was not told which rows of this step are decode rows, so nothing was re-routed: this vLLM version's "
                    "model runner is not supported in this mode, set compilation_config={'cudagraph_mode': 'PIECEWISE'} or "
                    "the environment variable VLLM_USE_V2_MODEL_RUNNER=0"
                )
            return result

        return execute_model

    def make_prepare_attn(original: Callable) -> Callable:
        def prepare_attn(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            if (state := ENGINE_STATES.get(_key(self.vllm_config))) is not None:
                state.query_start_loc = input_batch.query_start_loc
            return original(self, input_batch, *args, **kwargs)

        return prepare_attn

    def make_run_fullgraph(original: Callable) -> Callable:
        def run_fullgraph(self: Any, *args: Any, **kwargs: Any) -> Any:
            if (state := ENGINE_STATES.get(_key(self.vllm_config))) is not None:
                if isinstance(self, ModelCudaGraphManager):
                    state.begin_replay()
                else:
                    state.begin_draft_replay()
            return original(self, *args, **kwargs)

        return run_fullgraph

    def make_shutdown(original: Callable) -> Callable:
        def shutdown(self: Any, *args: Any, **kwargs: Any) -> Any:
            vllm_config = getattr(self, "vllm_config", None)
            state = ENGINE_STATES.pop(_key(vllm_config), None) if vllm_config is not None else None
            if state is not None:
                state.end()
            return original(self, *args, **kwargs)

        return shutdown

    _wrap(MoERunner, "__init__", make_init)
    _wrap(BaseModelLoader, "load_model", make_load)
    _wrap(forward_context, "create_forward_context", make_create)
    _wrap(WorkerWrapperBase, "initialize_from_config", make_initialize)
    _wrap(WorkerWrapperBase, "execute_model", make_execute)
    _wrap(WorkerWrapperBase, "shutdown", make_shutdown)
    setattr(WorkerWrapperBase, STATUS_METHOD, _status)
    if current_platform.is_cuda():
        from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, ModelCudaGraphManager
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        _wrap(GPUModelRunner, "prepare_attn", make_prepare_attn)
        # The base's, which the model's and the draft models' managers all call.
        _wrap(CudaGraphManager, "run_fullgraph", make_run_fullgraph)
