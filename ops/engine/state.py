"""What the plugin keeps for one engine worker: the policy of each layer, the rows' roles, and the counters."""

import logging
from typing import Any

import torch
from torch import Tensor

from sere.conf.errors import ConfigError
from sere.conf.schema import RerouteConfig
from sere.ops.engine.checks import find_attention_layer, refuse_engine_modes, refuse_monolithic, refuse_router
from sere.ops.engine.counters import CounterFile
from sere.ops.engine.roles import TokenRoles, fill_from_metadata
from sere.ops.model_digest import model_digest
from sere.ops.policies.policy import LayerInfo, Policy
from sere.ops.similarity import SimilarityArtifact

logger = logging.getLogger("vllm.sere")


class LayerState:
    """One MoE layer: its policy and its counters."""

    def __init__(self, policy: Policy, roles: TokenRoles) -> None:
        self.policy = policy
        self.roles = roles
        self.counters: Tensor | None = None

    @property
    def has_work(self) -> bool:
        """Whether steps need anything done at all."""
        return self.policy.changes_routing or self.counters is not None

    def route(self, topk_weights: Tensor, topk_ids: Tensor, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the policy to one step and count what it did: `Policy.route_and_count`."""
        if not self.has_work:
            return topk_weights, topk_ids
        num_rows = topk_ids.shape[0]
        if num_rows > self.roles.roles.numel():
            raise RuntimeError(
                f"a step has {num_rows} rows, more than the {self.roles.roles.numel()} that max_num_batched_tokens allows: "
                "token roles cannot be known"
            )
        roles = self.roles.roles[:num_rows]
        return self.policy.route_and_count(
            topk_weights, topk_ids, router_logits, roles, step=self.roles.step, counters=self.counters
        )


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
        self._model = vllm_config.model_config.model
        self.artifact: SimilarityArtifact | None = None
        if self.device.type == "cuda" and (self.config.policy != "none" or self.config.stats_dir):
            from sere.ops.kernels import cuda

            cuda.warm_up(torch.device("cuda", torch.cuda.current_device()))
        if self.config.similarity is not None and self.config.needs_tables:
            self.artifact = SimilarityArtifact.load(self.config.similarity)
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
        """Make the policy of one `MoERunner`.

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
        renormalize = getattr(runner.router, "renormalize", None)
        info = LayerInfo(
            index=index,
            # Not the router's count, which includes EPLB's redundant copies: re-routing is before that mapping.
            num_experts=runner.moe_config.num_logical_experts,
            top_k=runner.router.top_k,
            renormalize=None if renormalize is None else bool(renormalize),
            device=self.device,
        )
        tables = None
        if self.artifact is not None:
            if not self.layers:
                digest = model_digest(self._model) if self.config.check_model else None
                self.artifact.check_model(num_experts=info.num_experts, digest=digest)
            tables = {name: self.artifact.matrix(index, name) for name in self.artifact.metrics}
            if self.artifact.num_experts != info.num_experts:
                raise ConfigError(
                    f"layer {index} has {info.num_experts} experts, the artifact's layers {self.artifact.num_experts}: "
                    "use the artifact of this model"
                )
        self.layers[index] = LayerState(Policy(self.config, info, tables), self.roles)
        return self.layers[index]

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
        for layer in vllm_config.compilation_config.static_forward_context.values():
            if hasattr(layer, "sere_layer"):
                refuse_monolithic(layer)
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
