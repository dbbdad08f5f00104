"""vLLM builds layers while torch's default device is the GPU's and its default type the model's: what the plugin does then must
name both. On the CPU the device `meta`, on which nothing can be read, stands in for the GPU."""

import torch

from sere.conf.schema import RerouteConfig
from sere.ops.engine.counters import CounterFile
from sere.ops.engine.roles import TokenRoles
from sere.ops.kernels.counting import COUNTERS
from sere.ops.policies.policy import LayerInfo, Policy
from sere.ops.policies.scoring import Scoring
from sere.ops.similarity import SimilarityArtifact

CPU = torch.device("cpu")


def test_everything_made_at_engine_start(demo_artifact, tmp_path):
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            artifact = SimilarityArtifact.load(demo_artifact)
            scoring = Scoring(function="softmax")
            info = LayerInfo(index=1, num_experts=64, top_k=8, renormalize=True, device=CPU, scoring=scoring)
            for name in ("none", "sere", "oea", "top_k", "random"):
                made = Policy(RerouteConfig(policy=name, similarity="x"), info, artifact.layer_tables(1))
                if made.similarity is not None:
                    assert made.similarity.device == CPU and made.similarity.dtype == torch.float32
            roles = TokenRoles(capacity=9, device=CPU, decode_length=1, phase="decode", min_tokens=1, max_tokens=9)
            counters = CounterFile(layers=[0], device=CPU, folder=str(tmp_path), manifest={})
    finally:
        torch.set_default_dtype(torch.float32)
    assert roles.roles.device == roles.step.device == counters.counts.device == CPU
    assert counters.counts.shape == (1, len(COUNTERS)) and counters.counts.dtype == torch.int64
