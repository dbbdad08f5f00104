"""Every reason why an engine cannot be re-routed, found before it takes a request.

Whatever would make re-routing wrong or silently off is a ConfigError that says what to do. Reads vLLM objects, changes none.
"""

from typing import Any, get_args

import torch

from conf.schema import ConfigError, RerouteConfig
from ops.cuda import MAX_EXPERTS, MAX_TOP_K
from ops.token_roles import metadata_gives_roles


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
            "cannot be known: run independent replicas instead (sere generate, engine.replicas)",
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
            device.type not in ("cpu", "cuda") and config.policy in ("sere", "random"),
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


def refuse_sizes(num_experts: int, top_k: int, layer_name: str) -> None:
    """Refuse a layer that is larger than the CUDA kernel takes."""
    if num_experts > MAX_EXPERTS or top_k > MAX_TOP_K:
        raise ConfigError(
            f"{layer_name} has {num_experts} experts and top_k {top_k}, the CUDA kernel takes at most {MAX_EXPERTS} and "
            f"{MAX_TOP_K}: remove `sere` from additional_config"
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


def find_attention_layer(static_layers: dict[str, Any]) -> str:
    """An attention layer whose metadata tells which rows are decode rows."""
    seen = []
    for name, layer in static_layers.items():
        if not hasattr(layer, "get_attn_backend"):
            continue
        builder = layer.get_attn_backend().get_builder_cls()
        for base in builder.__mro__:
            for generic in getattr(base, "__orig_bases__", ()):
                for metadata_class in get_args(generic):
                    if isinstance(metadata_class, type):
                        seen.append(metadata_class.__name__)
                        if metadata_gives_roles(metadata_class):
                            return name
    raise ConfigError(
        "no attention backend of this model says which rows are decode rows (metadata: "
        f"{', '.join(sorted(set(seen))) or 'none'}): choose another attention backend, for example FLASH_ATTN, or remove "
        "`sere` from additional_config"
    )
