"""The hook at the output of a layer's routed experts, where a policy's compensation is added.

`MoERunner._apply_quant_method` calls `routed_experts.forward_modular` right after `select_experts`. Its result is in the units
of the routing weights: not yet summed over ranks, not yet multiplied by `routed_scaling_factor`, without shared experts. Where
that does not hold compensation is refused by name.

Traced by torch.compile the hook is the custom op `sere::compensate`: after `sere::route`, on whose result the experts' output
depends, and before the next layer's `sere::route`, whose input depends on what this op returns.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from sere.conf.errors import ConfigError
from sere.ops.engine.layer import ATTRIBUTE, is_traced, layer_of

_library = torch.library.Library("sere", "FRAGMENT")
_library.define("compensate(Tensor output, Tensor hidden_states, str layer_name) -> Tensor")


def _compensate(output: Tensor, hidden_states: Tensor, layer_name: str) -> Tensor:
    compensated = layer_of(layer_name).compensate(output, hidden_states)
    # A custom op must not return its arguments.
    return compensated.clone() if compensated is output else compensated


def _compensate_fake(output: Tensor, hidden_states: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(output)


_library.impl("compensate", _compensate, "CPU")
torch.library.register_fake("sere::compensate", _compensate_fake, lib=_library)


def hook_output(runner: Any) -> None:
    """Have the experts' output of a layer compensated, by the state that `runner` has at the time; once."""
    experts, layer_name = runner.routed_experts, runner.layer_name
    original = experts.forward_modular
    if hasattr(original, "sere_original"):
        return

    @functools.wraps(original)
    def forward_modular(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hidden_states = x.clone() if _in_place(runner) else x
        output = original(x, *args, **kwargs)
        if is_traced():
            return torch.ops.sere.compensate(output, hidden_states, layer_name)
        return getattr(runner, ATTRIBUTE).compensate(output, hidden_states)

    hooked: Any = forward_modular
    hooked.sere_original = original
    experts.forward_modular = hooked


def _in_place(runner: Any) -> bool:
    """Whether the output may be written over the input, as in vLLM versions whose configuration or kernel says so."""
    kernel = getattr(runner.routed_experts.quant_method, "moe_kernel", None)
    parts = kernel, getattr(kernel, "impl", None)
    return not getattr(runner.moe_config, "disable_inplace", True) or any(getattr(part, "inplace", False) for part in parts)


def refuse_output(runner: Any, policy: str, hidden_size: int) -> None:
    """Refuse compensation in a layer whose routed experts' output is not what the hook needs.

    Args:
        runner: The layer's `MoERunner`, with its kernel made.
        policy: Its name, for the error.
        hidden_size: That the artifact's tables are made for.

    Raises:
        ConfigError: naming the layer, the reason and the remedy.
    """
    experts, config = runner.routed_experts, runner.moe_config
    kernel = getattr(experts.quant_method, "moe_kernel", None)
    transformed = any(getattr(runner, f"routed_{name}_transform", None) is not None for name in ("input", "output"))
    hidden_dim = config.hidden_dim
    refusals = [
        (
            not hasattr(experts, "forward_modular") or runner.is_monolithic,
            "its backend chooses experts inside its kernel, which cannot be followed (on the CPU, vLLM 0.30 or newer can be)",
        ),
        (
            bool(getattr(experts, "apply_router_weight_on_input", False)),
            "the router's weight is applied to the experts' input, so nothing can be added in its units",
        ),
        (transformed, "its routed experts work in a latent space, for which there are no tables"),
        (
            hidden_dim != hidden_size or getattr(config, "hidden_dim_unpadded", None) not in (None, hidden_dim),
            f"its kernel works on {hidden_dim} columns, the artifact's tables have {hidden_size}",
        ),
        (
            bool(getattr(config, "use_deferred_moe_finalize", False)),
            "its kernel leaves the sum over a row's experts to what comes after it",
        ),
        (
            kernel is not None and kernel.output_is_reduced() and num_ranks() > 1,
            f"its kernel ({type(getattr(kernel, 'prepare_finalize', kernel)).__name__}) sums the output over ranks itself",
        ),
    ]
    for applies, reason in refusals:
        if applies:
            raise ConfigError(
                f"policy {policy!r} cannot compensate in {runner.layer_name}: {reason}: use compensation none "
                "(compensation: {rule: none})"
            )


def num_ranks() -> int:
    """Ranks whose outputs vLLM may sum after the experts."""
    from vllm.distributed import get_tensor_model_parallel_world_size

    return get_tensor_model_parallel_world_size()


def share_of(runner: Any) -> float:
    """What this rank adds of the compensation. All ranks route alike and know what was lost, whichever experts they hold."""
    config = runner.moe_config
    return 1 / num_ranks() if config.tp_size > 1 or config.ep_size > 1 else 1.0
