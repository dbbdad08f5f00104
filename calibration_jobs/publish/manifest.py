"""What an artifact says of itself: where it comes from, and how good it is."""

import platform
from typing import Any

from sere.calibration_jobs.facts import JobFacts, Similarities


def manifest_of(job: JobFacts, found: Similarities, quality: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a job's artifact."""
    import torch
    import transformers

    config, model, plan = job.config, job.model, job.plan
    return {
        "num_experts": model.num_experts,
        "layers": sorted({layer for layer, _ in found.matrices}),
        "metrics": list(config.metrics),
        "tables": sorted({name for _, name in found.tables}),
        "surrogate_rank": config.surrogate_rank if found.explained else None,
        "surrogate_explained": found.explained,
        "model": {"name": config.model, "digest": model.digest, "commit": model.commit, "dtype": config.dtype},
        "data": {
            "source": config.data,
            "digest": plan.digest,
            "num_sequences": plan.num_calibration_rows,
            "num_held_out": len(plan.held_out),
            "domains": list(plan.domains),
        },
        "num_tokens": found.num_tokens,
        "block_tokens": model.block_tokens,
        "config_digest": job.folder.digest,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "quality": _without_layers(quality),
    }


def _without_layers(value: Any) -> Any:
    """All figures over all layers, none of single layers."""
    if isinstance(value, dict):
        return {key: _without_layers(part) for key, part in value.items() if key != "layers"}
    return [_without_layers(part) for part in value] if isinstance(value, list) else value
