"""What the plugin keeps for one engine worker: the policy of each layer, the rows' roles, and the counters."""

import logging
from typing import Any

import torch
from torch import Tensor

from sere.conf.errors import ConfigError
from sere.conf.schema import RerouteConfig
from sere.ops.engine.checks import (
    find_attention_layer,
    refuse_engine_modes,
    refuse_monolithic,
    refuse_router,
    refuse_self_selecting,
)
from sere.ops.engine.counters import CounterFile
from sere.ops.engine.layer import ATTRIBUTE, LayerState
from sere.ops.engine.output_hook import refuse_output, share_of
from sere.ops.engine.roles import TokenRoles, fill_from_metadata
from sere.ops.engine.router_hook import own_routing
from sere.ops.engine.routers import ask_router
from sere.ops.model_digest import model_identity
from sere.ops.policies.compensation import Compensator
from sere.ops.policies.policy import LayerInfo, Policy
from sere.ops.policies.requirements import check_artifact
from sere.ops.policies.scoring import Scoring
from sere.ops.similarity import SimilarityArtifact

logger = logging.getLogger("vllm.sere")


class EngineState:
    """All MoE layers of one engine worker."""

    def __init__(self, settings: dict[str, Any], vllm_config: Any) -> None:
        """Check the settings against the engine's, before any layer is made.

        Args:
            settings: The user's `additional_config["sere"]`.
            vllm_config: The engine's `VllmConfig`.

        Raises:
            ConfigError: if the settings are wrong or the engine runs in a mode that is not supported.
        """
        from vllm.platforms import current_platform

        self.config = RerouteConfig.from_dict(settings).resolved()
        self.device = torch.device(current_platform.device_type)
        refuse_engine_modes(vllm_config, self.config, self.device)
        self._model, self._revision = vllm_config.model_config.model, vllm_config.model_config.revision
        self._dtype = vllm_config.model_config.dtype
        self.artifact: SimilarityArtifact | None = None
        if self.device.type == "cuda" and (self.config.policy != "none" or self.config.stats_dir):
            from sere.ops.kernels import cuda

            cuda.warm_up(torch.device("cuda", torch.cuda.current_device()))
        if self.config.similarity is not None and self.config.needs_tables:
            self.artifact = SimilarityArtifact.load(self.config.similarity)
            check_artifact(self.config, self.artifact)
        compilation, scheduler = vllm_config.compilation_config, vllm_config.scheduler_config
        speculative = vllm_config.speculative_config
        self.roles = TokenRoles(
            capacity=max(scheduler.max_num_batched_tokens, compilation.max_cudagraph_capture_size or 0),
            device=self.device,
            decode_length=1 + (speculative.num_speculative_tokens if speculative is not None else 0),
            phase=self.config.phase,
            min_tokens=self.config.min_tokens,
            max_tokens=self.config.max_tokens,
        )
        self.layers: dict[int, LayerState] = {}
        self._differences: dict[int, Tensor] = {}
        self._attention_layer: str | None = None
        self._counters: CounterFile | None = None
        self._serving = False
        self.num_steps_begun = 0
        """Steps whose roles were set: the plugin checks that it grows with every step."""
        self.query_start_loc: Tensor | None = None
        """The V2 model runner's description of the step it is about to run."""

    @property
    def has_work(self) -> bool:
        """Whether steps need anything done at all."""
        return any(layer.has_work for layer in self.layers.values())

    def add_layer(self, runner: Any) -> LayerState:
        """Make the policy of one `MoERunner`: whatever can be refused before weights are loaded is.

        Raises:
            ConfigError: if the layer cannot be re-routed, or not with this artifact.
        """
        index = runner.layer_id
        refuse_router(runner)
        if index in self.layers:
            raise ConfigError(
                f"layer {index} has two MoE blocks ({runner.layer_name}): re-routing of such models is not supported, "
                "remove `sere` from additional_config"
            )
        # Not the router's count, which includes EPLB's redundant copies: re-routing is before that mapping.
        num_experts = runner.moe_config.num_logical_experts
        if self.artifact is not None:
            if not self.layers:
                # Before a hub model's first download only its commit is known.
                self._check_model(num_experts, files_to_come=True)
            if self.artifact.num_experts != num_experts:
                raise ConfigError(
                    f"layer {index} has {num_experts} experts, the artifact's layers {self.artifact.num_experts}: "
                    "use the artifact of this model"
                )
        # A router is asked how it scores once its weights are loaded.
        self.layers[index] = LayerState(self._policy(runner, Scoring(function="softmax")), self.roles)
        return self.layers[index]

    def _check_model(self, num_experts: int, *, files_to_come: bool) -> None:
        assert self.artifact is not None
        model = model_identity(self._model, self._revision) if self.config.check_model else None
        self.artifact.check_model(num_experts=num_experts, model=model, files_to_come=files_to_come)

    def _policy(self, runner: Any, scoring: Scoring | None) -> Policy:
        renormalize = getattr(runner.router, "renormalize", None)
        info = LayerInfo(
            index=runner.layer_id,
            num_experts=runner.moe_config.num_logical_experts,
            top_k=runner.router.top_k,
            renormalize=None if renormalize is None else bool(renormalize),
            device=self.device,
            scoring=scoring,
        )
        return Policy(self.config, info, self._tables(runner.layer_id))

    def _tables(self, index: int) -> dict[str, Tensor]:
        return self.artifact.layer_tables(index) if self.artifact is not None else {}

    def _complete(self, runner: Any) -> None:
        """Finish a layer with what is known after weights are loaded and kernels made."""
        refuse_monolithic(runner)
        layer = self.layers[runner.layer_id]
        rules = layer.policy.rules
        if not layer.policy.changes_routing:
            return
        if rules.needs_scores:
            refuse_self_selecting(runner, self.config.policy)
            scoring = ask_router(
                runner.router,
                own_routing(runner),
                layer_name=runner.layer_name,
                num_experts=layer.policy.layer.num_experts,
                hidden_size=runner.moe_config.hidden_dim,
                dtype=self._dtype,
                device=self.device,
            )
            layer.policy = self._policy(runner, scoring)
        if rules.compensation.rule != "none":
            compensator = Compensator(rules.compensation, self._tables(runner.layer_id), device=self.device, dtype=self._dtype)
            refuse_output(runner, self.config.policy, compensator.means.shape[1])
            layer.compensate_with(compensator, self._difference(layer.policy.layer.num_experts), share_of(runner))

    def _difference(self, num_experts: int) -> Tensor:
        """The buffer that layers with so many experts share."""
        if num_experts not in self._differences:
            shape = (self.roles.capacity, num_experts)
            self._differences[num_experts] = torch.zeros(shape, dtype=torch.float32, device=self.device)
        return self._differences[num_experts]

    def status(self) -> dict[str, Any]:
        """What `assert_rerouting` asks of a worker."""
        return {"policy": self.config.policy, "num_layers": len(self.layers)}

    def finish_start(self, vllm_config: Any) -> None:
        """The checks that need the whole model, and the counters. Called once, before warm-up.

        Args:
            vllm_config: The engine's `VllmConfig`, which by now knows its attention and MoE layers.

        Raises:
            ConfigError: if re-routing would not take place or not be right.
        """
        from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

        if not self.layers and get_pp_group().world_size == 1:
            raise ConfigError(
                f"model {self._model} has no MoE layer that routes through vLLM's FusedMoERouter: "
                "remove `sere` from additional_config"
            )
        unknown = sorted(set(self.config.per_layer) - set(self.layers))
        if unknown and get_pp_group().world_size == 1:
            raise ConfigError(f"per_layer.{unknown[0]} names no MoE layer of the model ({sorted(self.layers)}): leave it out")
        if self.artifact is not None and self.layers:
            self._check_model(self.artifact.num_experts, files_to_come=False)
        for layer in vllm_config.compilation_config.static_forward_context.values():
            if hasattr(layer, ATTRIBUTE):
                self._complete(layer)
        self._attention_layer = find_attention_layer(vllm_config, self.device)
        if self._counters is None and self.layers:
            rank = get_tensor_model_parallel_rank()
            manifest = {"model": str(self._model), "reroute": self.config.to_dict()}
            indices = sorted(self.layers)
            folder = self.config.stats_dir if rank == 0 else None
            if folder is not None:
                self._counters = CounterFile(layers=indices, device=self.device, folder=folder, manifest=manifest)
                for row, index in enumerate(indices):
                    self.layers[index].counters = self._counters.counts[row]
        logger.info("SERE: policy %s on %d MoE layers", self.config.policy, len(self.layers))

    def begin_step(self, attn_metadata: Any) -> None:
        """Set the rows' roles from the step's attention metadata: by layer name, or None in profiling and warm-up."""
        if not self.has_work:
            return
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # The V2 model runner makes its forward context inside the graph. Recorded there, this would set the roles of the
            # capture at every replay; `begin_replay` sets those of the step.
            return
        if attn_metadata is None or self._attention_layer is None:
            self.roles.clear()
            return
        if not isinstance(attn_metadata, dict):
            raise RuntimeError("SERE needs one batch per step, got microbatches: turn off dual batch overlap (enable_dbo)")
        metadata = attn_metadata.get(self._attention_layer)
        if metadata is None:
            # A draft model's own step.
            self.roles.clear()
        else:
            fill_from_metadata(self.roles, metadata)
            self.num_steps_begun += 1

    def begin_replay(self) -> None:
        """Set the rows' roles before the V2 model runner replays a full CUDA graph, which it does without a forward context."""
        if self.has_work and self.query_start_loc is not None:
            self.roles.fill(self.query_start_loc)
            self.num_steps_begun += 1

    def begin_draft_replay(self) -> None:
        """Before the V2 model runner replays a draft model's full CUDA graph: its rows are not those of the model's step."""
        if self.has_work:
            self.roles.clear()

    def serve(self) -> None:
        """Called before every real step."""
        if self._counters is not None:
            if not self._serving:
                self._counters.reset()
                self._serving = True
            self._counters.flush(only_if_due=True)

    def end(self) -> None:
        """Called when the worker shuts down."""
        if self._counters is not None:
            self._counters.flush()


ENGINE_STATES: dict[int, EngineState] = {}
"""Live engines of this process, by the identity of their `static_forward_context`."""
