"""The engine that these tests share ends with the last of them; an artifact with tables."""

import math

import pytest

from tests.conftest import DEMO_MODEL
from tests.ops.engine.engines import end_engine

NUM_EXPERTS, HIDDEN_SIZE, STORED_RANK = 64, 128, 3


@pytest.fixture(scope="package", autouse=True)
def _engine_ends():
    yield
    end_engine()


@pytest.fixture(scope="package")
def artifact_with_tables(tmp_path_factory) -> str:
    """The demo model's, with drawn tables as large as what experts put out: compensation shows."""
    import torch

    from sere.ops.model_digest import model_digest
    from sere.ops.similarity import SimilarityArtifact

    generator = torch.Generator().manual_seed(1)

    def drawn(*shape):
        return (torch.randn(*shape, generator=generator) / math.sqrt(HIDDEN_SIZE)).bfloat16()

    matrices, tables = {}, {}
    for layer in range(4):
        values = torch.rand(NUM_EXPERTS, NUM_EXPERTS, generator=generator)
        matrices[layer, "cosine"] = torch.maximum(values, values.T).fill_diagonal_(1)
        tables[layer, "means"] = drawn(NUM_EXPERTS, HIDDEN_SIZE)
        for name in ("surrogate_in", "surrogate_out"):
            tables[layer, name] = drawn(NUM_EXPERTS * STORED_RANK, HIDDEN_SIZE)
        tables[layer, "surrogate_means"] = drawn(STORED_RANK, NUM_EXPERTS, HIDDEN_SIZE)
    manifest = {
        "num_experts": NUM_EXPERTS,
        "layers": [0, 1, 2, 3],
        "metrics": ["cosine"],
        "tables": ["means", "surrogate_in", "surrogate_out", "surrogate_means"],
        "surrogate_rank": STORED_RANK,
        "model": {"name": "demo", "digest": model_digest(DEMO_MODEL)},
    }
    folder = tmp_path_factory.mktemp("tables")
    return str(SimilarityArtifact(matrices, manifest, tables).save(folder / "similarity.safetensors"))
