"""Every reason why an engine cannot be re-routed, found before it takes a request.

Whatever would make re-routing wrong or silently off is a ConfigError that says what to do. Reads vLLM objects, changes none.
"""

from collections.abc import Iterator
from typing import Any, get_args

import torch

from sere.conf.errors import ConfigError
from sere.conf.schema import RerouteConfig
from sere.ops.engine.roles import metadata_gives_counts, metadata_gives_starts


def refuse_engine_modes(vllm_config: Any, config: RerouteConfig, device: torch.device) -> None:
    """Refuse what contradicts re-routing, or hides from a worker which rows are decode rows."""
    import vllm.envs as envs

    parallel = vllm_config.parallel_config
    refusals = [
        (
            envs.VLLM_BATCH_INVARIANT,
            "batch-invariant mode (VLLM_BATCH_INVARIANT=1) promises that a sequence does not depend on its batch, "
            "re-routing makes it depend: unset VLLM_BATCH_INVARIANT or remove `sere` from additional_config",
        ),
        (
            parallel.data_parallel_size > 1,
            f"data_parallel_size={parallel.data_parallel_size} mixes rows of several engines in one MoE layer, so their roles "
            "cannot be known: run independent replicas instead (sere generate, engine.num_replicas)",
        ),
        (
            getattr(parallel, "use_sequence_parallel_moe", False),
            "sequence-parallel MoE gives each rank a slice of the rows, so their roles cannot be known: use tensor "
            "parallelism without expert parallelism, or another all2all_backend",
        ),
        (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "prefill context parallelism splits rows over ranks, so their roles cannot be known: set "
            "prefill_context_parallel_size to 1",
        ),
        (
            getattr(parallel, "use_ubatching", False) or getattr(parallel, "enable_dbo", False),
            "dual batch overlap splits a step in microbatches, so its rows' roles cannot be known: set enable_dbo to false",
        ),
        (
            getattr(getattr(vllm_config, "cache_config", None), "kv_sharing_fast_prefill", False),
            "fast prefill drops rows in the middle of a step, so the roles of later layers cannot be known: set "
            "kv_sharing_fast_prefill to false",
        ),
        (
            device.type not in ("cpu", "cuda") and config.rules().targets.rule != "drop_unvoted",
            f"policy {config.policy!r} has no kernel for {device.type}: run it on an NVIDIA GPU or on the CPU, or use policy "
            "'none' or 'top_k'",
        ),
    ]
    for applies, message in refusals:
        if applies:
            raise ConfigError(message)


def refuse_router(runner: Any) -> None:
    """Refuse a layer whose routing does not pass through `_compute_routing` with one id per routed expert."""
    router = runner.router
    name = type(router).__name__
    if not hasattr(router, "_compute_routing"):
        raise ConfigError(f"{runner.layer_name} routes with {name}, which cannot be followed: remove `sere`")
    if name == "ZeroExpertRouter":
        raise ConfigError(f"{runner.layer_name} has zero-computation experts, which cannot be re-routed: remove `sere`")
    if getattr(router, "num_fused_shared_experts", 0):
        raise ConfigError(
            f"{runner.layer_name} routes its shared experts together with the others: turn that fusion off "
            "(VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=0)"
        )


def self_selecting_experts(runner: Any) -> Any | None:
    """The experts object of a monolithic backend that selects experts in a Python method, which can be followed like a router.

    vLLM's CPU backend for unquantised experts was of that kind before 0.30.
    """
    kernel = getattr(runner.routed_experts.quant_method, "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    return experts if runner.is_monolithic and hasattr(experts, "_select_experts") else None


def refuse_monolithic(runner: Any) -> None:
    """Refuse a MoE backend that routes inside its kernel and never calls the router."""
    if runner.is_monolithic and self_selecting_experts(runner) is None:
        method = runner.routed_experts.quant_method
        kernel = getattr(method, "moe_kernel", None)
        backend = type(getattr(kernel, "fused_experts", None) or method).__name__
        raise ConfigError(
            f"{runner.layer_name} runs on {backend}, which routes inside its kernel and would never be re-routed: choose "
            "another MoE backend, for example moe_backend='triton' (vllm serve --moe-backend triton); on the CPU, vLLM 0.30 "
            "or newer"
        )


def refuse_self_selecting(runner: Any, policy: str) -> None:
    """Refuse a policy that needs the router's scores where the experts' object routes, which cannot be asked alone."""
    if self_selecting_experts(runner) is not None:
        raise ConfigError(
            f"policy {policy!r} needs the router's scores of all experts, and {runner.layer_name} selects experts in its CPU "
            "backend, which cannot be asked: use vLLM 0.30 or newer, or policy sere, which works from ids alone"
        )


def find_attention_layer(vllm_config: Any, device: torch.device) -> str:
    """An attention layer whose metadata tells which rows are decode rows: if possible one that says where each sequence's rows
    begin, as in a model that mixes kinds of attention some layers may only count rows.

    Raises:
        ConfigError: if there is none, or if all there are only count rows and would be wrong in this engine's modes.
    """
    layers = list(_attention_metadata(vllm_config.compilation_config.static_forward_context))
    for name, metadata_class in layers:
        if metadata_gives_starts(metadata_class):
            return name
    for name, metadata_class in layers:
        if metadata_gives_counts(metadata_class):
            _refuse_counts(metadata_class.__name__, vllm_config, device)
            return name
    raise ConfigError(
        "no attention backend of this model says which rows are decode rows (metadata: "
        f"{', '.join(sorted({metadata_class.__name__ for _, metadata_class in layers})) or 'none'}): choose another attention "
        "backend, for example FLASH_ATTN, or remove `sere` from additional_config"
    )


def _attention_metadata(static_layers: dict[str, Any]) -> Iterator[tuple[str, type[Any]]]:
    """Each attention layer's name with the class of its metadata, which its backend's builder names as a type parameter."""
    for name, layer in static_layers.items():
        if not hasattr(layer, "get_attn_backend"):
            continue
        for base in layer.get_attn_backend().get_builder_cls().__mro__:
            for generic in getattr(base, "__orig_bases__", ()):
                yield from ((name, argument) for argument in get_args(generic) if isinstance(argument, type))


def _refuse_counts(metadata: str, vllm_config: Any, device: torch.device) -> None:
    """Refuse modes in which a backend's number of decode rows is not what it seems."""
    speculates = vllm_config.speculative_config is not None
    # vLLM counts a full graph's padding as decode rows. Piecewise graphs leave attention, and so its metadata, unpadded.
    mode = vllm_config.compilation_config.cudagraph_mode
    pads = device.type == "cuda" and mode is not None and mode.has_full_cudagraphs()
    if not (speculates or pads):
        return
    reasons = ["leave out rows with speculative tokens"] * speculates + [f"include padding (cudagraph_mode {mode})"] * pads
    remedies = ["turn speculative decoding off"] * speculates + ["set cudagraph_mode to PIECEWISE"] * pads
    raise ConfigError(
        f"the attention backends of this model give only counts of decode rows ({metadata}), which here may "
        f"{' and '.join(reasons)}: choose attention backend FLASH_ATTN or TRITON_ATTN, or {' and '.join(remedies)}"
    )
