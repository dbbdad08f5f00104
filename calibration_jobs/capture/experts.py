"""Stands between a Transformers MoE model and its experts: sees what each layer's experts are asked, and may ask them more.

Since Transformers 5, about 55 model families compute a layer's experts in one module with
`forward(hidden_states, top_k_index, top_k_weights)`. Calling it with one forced expert and weight 1 gives that expert's own
output; no per-architecture code is needed.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from sere.calibration_jobs.capture.routers import Router, router_of
from sere.conf.errors import ConfigError
from sere.ops.policies.scoring import Scoring

# GPT-OSS names the same arguments differently.
_ARGUMENTS = (("hidden_states", "top_k_index", "top_k_weights"), ("hidden_states", "router_indices", "routing_weights"))
# Token-expert pairs computed in one call: enough to fill a device, few enough that intermediate results stay small.
_PAIRS_PER_CALL = 2048


class Experts(Protocol):
    """What is asked of an experts module: the count that every family's has, and what any `nn.Module` has."""

    num_experts: int

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def register_forward_hook(self, hook: Callable[..., Any]) -> Any: ...


def find_expert_modules(model: nn.Module) -> dict[int, Experts]:
    """The experts module of each MoE layer, by layer index.

    Raises:
        ConfigError: if the model has none, or two in one layer.
    """
    found: dict[int, Experts] = {}
    for name, module in model.named_modules():
        parameters = tuple(inspect.signature(module.forward).parameters)
        index = re.search(r"(?:^|\.)(\d+)\.", name)
        if parameters[:3] not in _ARGUMENTS or index is None or not hasattr(module, "num_experts"):
            continue
        layer = int(index.group(1))
        if layer in found:
            raise ConfigError(f"{type(model).__name__} has two experts modules in layer {layer}: such models are not supported")
        found[layer] = cast(Experts, module)
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no experts module with forward({', '.join(_ARGUMENTS[0])}): not a MoE model that "
            "Transformers 5 computes that way, so its experts cannot be compared"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class ExpertsCall:
    """One call of one layer's experts by the model."""

    layer: int
    module: Experts
    hidden_states: Tensor
    """`[num_tokens, hidden_size]`, the rows of all sequences one after another."""
    topk_ids: Tensor
    """int64 `[num_tokens, top_k]`."""
    topk_weights: Tensor
    """Float, same shape."""
    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    """The experts themselves: hidden states, ids, weights -> `[num_tokens, hidden_size]`. Their weights are in memory while
    the call lasts, also where they are otherwise on disk."""
    router: Router | None = None
    """The layer's, if there is one that can be told."""

    def router_logits(self) -> Tensor:
        """The router's, `[num_tokens, num_experts]`; only where there is a `scoring`."""
        assert self.router is not None and self.router.logits is not None
        return self.router.logits

    @property
    def scoring(self) -> Scoring | None:
        """How the router makes scores of its logits; None where no known way reproduces its choice."""
        return self.router.scoring(self.topk_weights, self.topk_ids) if self.router is not None else None

    def run(self, topk_ids: Tensor | None = None, topk_weights: Tensor | None = None) -> Tensor:
        """The layer's output as asked, or with other ids and weights."""
        ids = self.topk_ids if topk_ids is None else topk_ids
        return self.forward(self.hidden_states, ids, self.topk_weights if topk_weights is None else topk_weights)

    def all_experts(self, hidden_states: Tensor) -> Tensor:
        """Outputs of every expert for the same tokens.

        Args:
            hidden_states: `[num_tokens, hidden_size]`.

        Returns:
            `[num_experts, num_tokens, hidden_size]`.
        """
        num_tokens, hidden_size = hidden_states.shape
        num_experts = self.module.num_experts
        outputs = hidden_states.new_empty(num_experts, num_tokens, hidden_size)
        for experts in torch.arange(num_experts, device=hidden_states.device).split(max(1, _PAIRS_PER_CALL // num_tokens)):
            index = experts.repeat_interleave(num_tokens).unsqueeze(1)
            rows = hidden_states.repeat(len(experts), 1)
            weights = self.topk_weights.new_ones(len(index), 1)
            outputs[experts[0] : experts[-1] + 1] = self.forward(rows, index, weights).view(-1, num_tokens, hidden_size)
        return outputs


Handler = Callable[[ExpertsCall], Tensor]


@contextmanager
def intercept_experts(model: nn.Module, handle: Handler) -> Iterator[None]:
    """While the block runs, every call of experts goes through `handle`, whose result the model gets.

    Accelerate's hooks, which bring weights to the device and take them away again, stay outermost: everything `handle` does
    with a layer reads the layer's weights from disk once.
    """
    replaced, hooks = [], []
    for layer, module in find_expert_modules(model).items():
        attribute = "_old_forward" if hasattr(module, "_old_forward") else "forward"
        replaced.append((module, attribute, module.__dict__.get(attribute)))
        router = router_of(model, cast(nn.Module, module), module.num_experts)
        if router is not None:
            hooks.append(router.module.register_forward_hook(router.observe))
        setattr(module, attribute, _replacement(layer, module, getattr(module, attribute), handle, router))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, attribute, before in replaced:
            if before is None:
                delattr(module, attribute)
            else:
                setattr(module, attribute, before)


def _replacement(layer: int, module: Experts, own: Callable, handle: Handler, router: Router | None) -> Callable:
    signature = inspect.signature(own)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        hidden_states, topk_ids, topk_weights = signature.bind(*args, **kwargs).arguments.values()
        call = ExpertsCall(
            layer=layer,
            module=module,
            hidden_states=hidden_states.reshape(-1, hidden_states.shape[-1]),
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            forward=own,
            router=router,
        )
        return handle(call).view(hidden_states.shape)

    return forward


Observer = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class TokenBlock:
    """Some tokens of one layer, with all that the layer knows of them."""

    hidden_states: Tensor
    """What the experts got, `[num_tokens, hidden_size]`."""
    outputs: Tensor
    """What every expert makes of it, `[num_experts, num_tokens, hidden_size]`."""
    topk_ids: Tensor
    """int64 `[num_tokens, top_k]`."""
    topk_weights: Tensor
    """Float, same shape."""
    selection: Tensor | None
    """What the router ranks by, float32 `[num_tokens, num_experts]`; None where it cannot be followed."""


def observe_experts(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    observe: Observer,
    *,
    block_tokens: int,
    observe_block: Callable[[int, TokenBlock], None] | None = None,
) -> None:
    """Run batches through a model and hand every layer's all-experts outputs to an observer, block by block.

    The model's own results are not changed: the further calls of the experts happen beside them, on the same inputs. A block
    is a random sample of its batch's tokens, the same one each time: neighbours in a text are alike, and the CKA of a block
    of neighbours is not that of all tokens.

    Args:
        model: A Transformers MoE model in evaluation mode.
        batches: `input_ids` and `attention_mask`, int64 `[num_sequences, sequence_length]` each; padding does not count.
        observe: Called with a layer index, outputs `[num_experts, num_tokens, hidden_size]`, and which of all batches' tokens
            (counted without padding) they are, int64 `[num_tokens]`; several times a layer.
        block_tokens: Most tokens handed over at once.
        observe_block: Called with a layer index and the same tokens with all that is known of them. None: nobody asks.
    """
    valid, first = torch.empty(0), 0

    def handle(call: ExpertsCall) -> Tensor:
        rows = valid.to(call.hidden_states.device)
        tokens = call.hidden_states[rows]
        ids, weights = call.topk_ids[rows], call.topk_weights[rows]
        scoring = call.scoring if observe_block is not None else None
        selection = scoring.scores(call.router_logits()[rows])[1] if scoring is not None else None
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
        # Equal parts: a short last block would have no CKA estimate.
        for block in order.tensor_split(max(1, -(-len(tokens) // block_tokens))):
            if not len(block):
                continue
            here = block.to(tokens.device)
            outputs = call.all_experts(tokens[here])
            observe(call.layer, outputs, block + first)
            if observe_block is not None:
                known = TokenBlock(
                    hidden_states=tokens[here],
                    outputs=outputs,
                    topk_ids=ids[here],
                    topk_weights=weights[here],
                    selection=None if selection is None else selection[here],
                )
                observe_block(call.layer, known)
        return call.run()

    with torch.inference_mode(), intercept_experts(model, handle):
        for batch in batches:
            valid = batch["attention_mask"].bool().flatten()
            # The language-model head is not needed, but not every family lets it be left out.
            model(**batch, use_cache=False, logits_to_keep=1)
            first += int(valid.sum())
