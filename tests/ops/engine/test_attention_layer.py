"""From which attention layer the rows' roles are read, and what is refused where none tells them."""

import importlib
from types import SimpleNamespace, new_class

import pytest
import torch

from sere.conf.errors import ConfigError
from sere.ops.engine.checks import find_attention_layer
from sere.ops.engine.roles import metadata_gives_counts, metadata_gives_starts

CUDA = torch.device("cuda")


class StartsMetadata:
    query_start_loc: torch.Tensor
    num_decode_tokens: int
    num_prefill_tokens: int


class CountsMetadata:
    """As FlashInfer's, and that of state-space layers."""

    num_decode_tokens: int
    num_prefill_tokens: int


class SlotsMetadata:
    slot_mapping: torch.Tensor


def with_attention(*metadata, mode="NONE", speculative=None):
    """An engine's configuration with an attention layer for each class of metadata, and one layer that is no attention."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.attention.backend import AttentionMetadataBuilder

    layers = {"model.layers.0.mlp": SimpleNamespace()}
    for index, metadata_class in enumerate(metadata):
        builder = new_class("Builder", (AttentionMetadataBuilder[metadata_class],))
        backend = SimpleNamespace(get_builder_cls=lambda builder=builder: builder)
        layers[f"model.layers.{index}.self_attn"] = SimpleNamespace(get_attn_backend=lambda backend=backend: backend)
    compilation = SimpleNamespace(static_forward_context=layers, cudagraph_mode=CUDAGraphMode[mode])
    return SimpleNamespace(compilation_config=compilation, speculative_config=speculative)


def test_attention_backend_without_roles():
    with pytest.raises(ConfigError, match=r"metadata: SlotsMetadata.*another attention backend"):
        find_attention_layer(with_attention(SlotsMetadata), CUDA)
    with pytest.raises(ConfigError, match=r"metadata: none"):
        find_attention_layer(with_attention(), CUDA)


def test_an_attention_layer_that_gives_starts_is_preferred():
    """A model of several kinds of attention: whatever the mode, counts are not asked for."""
    config = with_attention(SlotsMetadata, CountsMetadata, StartsMetadata, CountsMetadata, mode="FULL", speculative=object())
    assert find_attention_layer(config, CUDA) == "model.layers.2.self_attn"


@pytest.mark.parametrize(
    ("device", "mode", "speculative", "message"),
    [
        ("cuda", "NONE", None, None),
        ("cuda", "PIECEWISE", None, None),
        ("cpu", "FULL_AND_PIECEWISE", None, None),
        (
            "cuda",
            "FULL",
            None,
            r"padding \(cudagraph_mode FULL\).*FLASH_ATTN or TRITON_ATTN, or set cudagraph_mode to PIECEWISE",
        ),
        ("cuda", "FULL_AND_PIECEWISE", None, r"CountsMetadata.*padding.*PIECEWISE$"),
        ("cuda", "FULL_DECODE_ONLY", None, r"CountsMetadata.*padding.*PIECEWISE$"),
        ("cuda", "PIECEWISE", object(), r"speculative tokens: .*TRITON_ATTN, or turn speculative decoding off$"),
        ("cpu", "NONE", object(), r"speculative tokens: .*TRITON_ATTN, or turn speculative decoding off$"),
        ("cuda", "FULL", object(), r"tokens and include padding.*decoding off and set cudagraph_mode to PIECEWISE$"),
    ],
)
def test_counts_alone_are_refused_where_they_mislead(device, mode, speculative, message):
    config = with_attention(SlotsMetadata, CountsMetadata, CountsMetadata, mode=mode, speculative=speculative)
    if message is None:
        assert find_attention_layer(config, torch.device(device)) == "model.layers.1.self_attn"
    else:
        with pytest.raises(ConfigError, match=message):
            find_attention_layer(config, torch.device(device))


def test_what_vllm_backends_give():
    """The backends of vLLM that this machine can import: some tell where each sequence's rows begin, others only count."""
    starts = {
        "vllm.v1.attention.backends.cpu_attn": "CPUAttentionMetadata",
        "vllm.v1.attention.backends.flash_attn": "FlashAttentionMetadata",
        "vllm.v1.attention.backends.triton_attn": "TritonAttentionMetadata",
        "vllm.model_executor.layers.attention.mla_attention": "MLACommonMetadata",
    }
    counts = {
        "vllm.v1.attention.backends.flashinfer": "FlashInferMetadata",
        "vllm.v1.attention.backends.gdn_attn": "GDNAttentionMetadata",
        "vllm.v1.attention.backends.mamba2_attn": "Mamba2AttentionMetadata",
    }
    checked = []
    for module, name in (starts | counts).items():
        try:
            metadata = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
        assert metadata_gives_starts(metadata) == (module in starts), name
        assert metadata_gives_starts(metadata) or metadata_gives_counts(metadata), name
        checked.append(name)
    assert "CPUAttentionMetadata" in checked and len(checked) > 1
