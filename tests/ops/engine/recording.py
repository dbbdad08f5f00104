"""Looks into an engine of this process: what its layers are given, and what they give to the experts."""

import sys
from unittest import mock

import torch

from sere.ops.reference import DECODE, reroute_reference
from sere.ops.similarity import SimilarityArtifact
from tests.ops.engine.engines import moe_layers


class Recording:
    """What the layers of an engine saw and did, step by step and layer by layer."""

    def __init__(self, llm, monkeypatch, *, experts: bool) -> None:
        self._patch = monkeypatch.setattr
        self.steps = []
        self.at_experts = []
        for index, runner in moe_layers(llm).items():
            self._record_route(index, runner.sere_layer)
            if experts:
                self._record_experts(index, runner.routed_experts)

    def _record_route(self, index, layer) -> None:
        original = layer.route

        def route(topk_weights, topk_ids, router_logits):
            roles = layer.roles.roles[: topk_ids.shape[0]].clone()
            before = topk_weights.clone(), topk_ids.clone()
            after = original(topk_weights, topk_ids, router_logits)
            self.steps.append((index, *before, roles, after[0].clone(), after[1].clone()))
            return after

        self._patch(layer, "route", route)

    def _record_experts(self, index, routed_experts) -> None:
        experts = routed_experts.quant_method.moe_kernel.fused_experts
        if routed_experts.quant_method.is_monolithic:
            # vLLM's CPU backend before 0.30: the ids go straight to the kernel.
            apply, module = experts.apply, sys.modules[type(experts).__module__]
            kernel = module.cpu_fused_moe

            def recorded(*args, **kwargs):
                self.at_experts.append((index, args[6].clone()))
                return kernel(*args, **kwargs)

            def apply_recorded(*args, **kwargs):
                with mock.patch.object(module, "cpu_fused_moe", recorded):
                    return apply(*args, **kwargs)

            self._patch(experts, "apply", apply_recorded)
            return
        original = routed_experts.forward_modular

        def forward_modular(*args, **kwargs):
            self.at_experts.append((index, kwargs["topk_ids"].clone()))
            return original(*args, **kwargs)

        self._patch(routed_experts, "forward_modular", forward_modular)


def check_against_reference(recording, artifact, *, primary_top_k, threshold) -> int:
    """Every recorded step is the reference's; returns the number of slots re-routed."""
    matrices = SimilarityArtifact.load(artifact)
    rerouted = 0
    for index, weights, ids, roles, new_weights, new_ids in recording.steps:
        similarity = matrices.matrix(index, "cosine")
        expected = reroute_reference(weights, ids, similarity, primary_top_k=primary_top_k, threshold=threshold, roles=roles)
        assert torch.equal(new_ids, expected)
        assert torch.equal(new_weights, weights)
        assert torch.equal(new_ids[roles != DECODE], ids[roles != DECODE])
        rerouted += int((new_ids != ids).sum())
    return rerouted
