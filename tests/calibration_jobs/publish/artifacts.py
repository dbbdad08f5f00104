"""An artifact with drawn matrices and a quality record."""

import torch

from sere.ops.similarity import SimilarityArtifact


def artifact(
    seed: int = 0, *, metrics=("cosine", "cka"), num_experts: int = 6, error: float = 0.2, tables=()
) -> SimilarityArtifact:
    """`tables`: some of norms and means."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for layer in (0, 1):
        for metric in metrics:
            values = torch.rand(num_experts, num_experts, generator=generator)
            matrices[layer, metric] = torch.maximum(values, values.T).fill_diagonal_(1)
    setting = {"primary_top_k": 2, "batch_size": 16, "threshold": 0.0}
    figures = {"alignment": 0.9, "critical_share": 0.0, "active_before": 5.0, "active_after": 3.0}
    quality = {
        "reliability": [{"num_tokens": 99, "metrics": {"cosine": {"spearman": 0.9, "decision": 0.8}}}],
        "reference": {"metric": "cosine", **setting},
        "held_out": [
            {"candidate": name, **setting, "error": value, **figures} for name, value in (("cosine", error), ("random", 0.4))
        ],
        "emulation": [
            {"policy": "none", "primary_top_k": None, "batch_size": 16, "perplexity": 3.0, "kl": 0.0, "agreement": 1.0,
             "active_experts": 5.0, "num_tokens": 7}
        ],
    }  # fmt: skip
    manifest = {
        "num_experts": num_experts,
        "layers": [0, 1],
        "metrics": list(metrics),
        "model": {"name": "m", "digest": "d"},
        "data": {"digest": f"data-{seed}"},
        "quality": quality,
    }
    if tables:
        manifest["tables"] = list(tables)
    made = {}
    for layer in (0, 1):
        drawn = torch.rand(num_experts, 5, generator=generator)  # the same whichever are asked for
        both = {"norms": drawn[:, 0].contiguous(), "means": drawn[:, 1:].bfloat16().contiguous()}
        made |= {(layer, name): both[name] for name in tables}
    return SimilarityArtifact(matrices, manifest, made)
