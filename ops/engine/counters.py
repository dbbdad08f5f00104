"""The counters of a worker in a file: accumulated where the op runs, readable from another process, crash-safe.

A worker's counters live in one int64 `[num_layers, len(COUNTERS)]` tensor. On the CPU that tensor is a memory-mapped file (each
count is on disk the moment it is made, however the process ends); from a GPU it is copied to one every few seconds and at
shutdown. A JSON file beside it names the layers.
"""

import atexit
import json
import os
import socket
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sere.conf.whole_file import written_whole
from sere.ops.kernels.counting import COUNTERS

_FLUSH_INTERVAL_S = 2.0


class CounterFile:
    """One engine worker's counters, on its device and in a file."""

    def __init__(self, *, layers: list[int], device: torch.device, folder: str, manifest: dict[str, Any]) -> None:
        shape = (len(layers), len(COUNTERS))
        self.layers = layers
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        path = root / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.counters"
        path.write_bytes(bytes(8 * shape[0] * shape[1]))
        self._mapped = torch.from_file(str(path), shared=True, size=shape[0] * shape[1], dtype=torch.int64).view(shape)
        with written_whole(path.with_suffix(".json")) as aside:
            aside.write_text(json.dumps({**manifest, "layers": layers, "counters": COUNTERS}, indent=1))
        self.counts = self._mapped if device.type == "cpu" else torch.zeros(shape, dtype=torch.int64, device=device)
        self._next_flush = 0.0
        atexit.register(self.flush)

    def reset(self) -> None:
        """Forget what warm-up steps counted."""
        self.counts.zero_()

    def flush(self, *, only_if_due: bool = False) -> None:
        """Copy counts from a GPU to the file. Waits for the GPU, hence at most every few seconds while serving."""
        if self._mapped is self.counts:
            return
        now = time.monotonic()
        if not only_if_due or now >= self._next_flush:
            self._mapped.copy_(self.counts)
            self._next_flush = now + _FLUSH_INTERVAL_S


@dataclass(frozen=True)
class LayerCounts:
    """One layer's counters, summed over replicas."""

    layer: int
    counts: dict[str, int]

    def per_step(self, name: str) -> float:
        return self.counts[name] / max(1, self.counts["steps"])


def read_counters(folder: str | os.PathLike[str]) -> list[LayerCounts]:
    """Sum the counters of all workers that wrote to `folder`, per layer, in layer order.

    Tensor-parallel ranks route the same tokens: only rank 0 of each group writes a file.
    """
    sums: dict[int, dict[str, int]] = {}
    for manifest_file in sorted(Path(folder).glob("*.json")):
        manifest = json.loads(manifest_file.read_text())
        raw = bytearray(manifest_file.with_suffix(".counters").read_bytes())
        table = torch.frombuffer(raw, dtype=torch.int64).view(len(manifest["layers"]), len(manifest["counters"]))
        for layer, row in zip(manifest["layers"], table.tolist(), strict=True):
            total = sums.setdefault(layer, dict.fromkeys(COUNTERS, 0))
            for name, value in zip(manifest["counters"], row, strict=True):
                total[name] += value
    return [LayerCounts(layer, sums[layer]) for layer in sorted(sums)]


def summarize(layers: Iterable[LayerCounts]) -> dict[str, float]:
    """Averages over steps and layers: active experts before and after, shares of slots re-routed and kept critical.

    Active experts, and the share of them that is saved, are stated over all steps and, as `rerouting_...`, over the
    re-routing ones without prefill rows: where a policy acts, and alone. Those keys are missing where there was no such step.
    """
    layers = [layer for layer in layers if layer.counts["steps"]]
    if not layers:
        return {}
    # Counts of an earlier version lack what that did not count.
    total = {name: sum(layer.counts.get(name, 0) for layer in layers) for name in COUNTERS}
    decode_only = max(1, total["steps"] - total["mixed_steps"])
    summary = {
        "decode_steps": total["steps"] / len(layers),
        "rerouting_steps": total["rerouting_steps"] / len(layers),
        "decode_rows_per_step": total["decode_rows"] / total["steps"],
        "active_experts_before": total["active_experts_before"] / total["steps"],
        "active_experts_after": total["active_experts_after"] / total["steps"],
        "saved_share": _saved(total, ""),
        "mixed_step_share": total["mixed_steps"] / total["steps"],
        "decode_only_active_experts_before": (total["active_experts_before"] - total["mixed_active_experts_before"])
        / decode_only,
        "decode_only_active_experts_after": (total["active_experts_after"] - total["mixed_active_experts_after"]) / decode_only,
        "rerouted_share": total["rerouted_slots"] / max(1, total["decode_slots"]),
        "critical_share": total["critical_slots"] / max(1, total["decode_slots"]),
    }
    if total["pure_steps"]:
        summary |= {
            "rerouting_active_experts_before": total["pure_active_experts_before"] / total["pure_steps"],
            "rerouting_active_experts_after": total["pure_active_experts_after"] / total["pure_steps"],
            "rerouting_saved_share": _saved(total, "pure_"),
        }
    return summary


def _saved(total: dict[str, int], steps: str) -> float:
    before, after = (total[f"{steps}active_experts_{when}"] for when in ("before", "after"))
    return 1 - after / before if before else 0.0
