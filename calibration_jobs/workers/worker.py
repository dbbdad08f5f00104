"""What runs on a calibration worker: one copy of the model, and the work on one shard or one held-out batch at a time.

A plain class; the job makes it a Ray actor. Every result depends on the arguments and the config alone.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sere.calibration_jobs.shards import TokenRow
from sere.calibration_jobs.workers.results import Result
from sere.conf.errors import ConfigError
from sere.conf.schema import CalibrateConfig

_OFFLOAD_PREFIX = "sere-offload-"


def block_tokens_of(config: CalibrateConfig, *, num_experts: int, hidden_size: int) -> int:
    """Tokens of a block: `block_tokens`, or as many as fit `max_activation_bytes`.

    A token takes its outputs of all experts in the model's dtype, and two float32 copies that the metrics make.

    Raises:
        ConfigError: if not even four tokens fit, the least that the CKA estimate needs.
    """
    bytes_per_token = num_experts * hidden_size * ((4 if config.dtype == "float32" else 2) + 8)
    fitting = config.max_activation_bytes // bytes_per_token
    if fitting < 4:
        raise ConfigError(
            f"max_activation_bytes must be at least {4 * bytes_per_token} for this model (4 tokens of {num_experts} experts of "
            f"{hidden_size} values, {bytes_per_token} bytes a token), got {config.max_activation_bytes}"
        )
    return min(config.block_tokens, fitting)


def _offload_folder(parent: str | None) -> tempfile.TemporaryDirectory:
    """A folder for this process. Those of processes that were killed are removed: each may be as large as the model."""
    place = Path(parent or tempfile.gettempdir())
    place.mkdir(parents=True, exist_ok=True)
    for other in place.glob(f"{_OFFLOAD_PREFIX}*"):
        owner = other.name.removeprefix(_OFFLOAD_PREFIX).split("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(other, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix=f"{_OFFLOAD_PREFIX}{os.getpid()}-", dir=place)


class CalibrationWorker:
    """One copy of the model."""

    def __init__(self, config: CalibrateConfig, block_tokens: int) -> None:
        self._config = config
        self._block_tokens = block_tokens
        self._device = "cuda" if config.num_gpus_per_worker else "cpu"
        self._model: Any = None
        self._offload: tempfile.TemporaryDirectory | None = None

    def ready(self) -> None:
        """Load the model. Not in the constructor: an error there would reach the driver as a dead actor."""
        from sere.calibration_jobs.workers.model import load_model

        self._offload = _offload_folder(self._config.offload_folder)
        self._model = load_model(self._config, self._offload.name)

    def sums(self, rows: Sequence[TokenRow], domains: Sequence[str]) -> Result:
        """Sums of all metrics over one shard, float64 `[num_experts, num_experts]`: of all tokens, and, if there are several
        domains, of each one's tokens. Keys as in `sere.calibration_jobs.metrics.merge`."""
        import torch

        from sere.calibration_jobs.capture.experts import find_expert_modules, observe_experts
        from sere.calibration_jobs.metrics.base import METRIC_CLASSES
        from sere.calibration_jobs.metrics.merge import ALL, key_of
        from sere.calibration_jobs.workers.model import pad_rows

        started = time.monotonic()
        metrics = [metric for metric in self._config.metrics if metric in METRIC_CLASSES]
        token_domains = torch.tensor([domains.index(row.domain) for row in rows for _ in row.tokens])
        counts = torch.bincount(token_domains, minlength=len(domains)).tolist()
        parts = [None] + [number for number in range(len(domains)) if len(domains) > 1 and counts[number]]
        sums = {
            key_of(layer, metric, part): METRIC_CLASSES[metric](module.num_experts)
            for layer, module in find_expert_modules(self._model).items()
            for metric in metrics
            for part in parts
        }

        def observe(layer: int, outputs: torch.Tensor, tokens: torch.Tensor) -> None:
            for part in parts:
                own = outputs if part is None else outputs[:, (token_domains[tokens] == part).to(outputs.device)]
                for metric in metrics:
                    sums[key_of(layer, metric, part)].update(own)

        size = self._config.batch_size
        batches = [
            pad_rows([row.tokens for row in rows[start : start + size]], self._device) for start in range(0, len(rows), size)
        ]
        observe_experts(self._model, batches, observe, block_tokens=self._block_tokens)
        for key, metric in sums.items():
            if not metric.sums.isfinite().all():
                raise ConfigError(
                    f"outputs of the experts of layer {key.split('.')[0]} are not finite in {self._config.dtype}: try "
                    "dtype=float32 or dtype=bfloat16, and check the model"
                )
        info = {
            "num_tokens": {ALL: sum(counts)} | {str(number): count for number, count in enumerate(counts)},
            "elapsed_s": time.monotonic() - started,
            "peak_memory_bytes": self._peak_memory(),
        }
        return {key: metric.sums for key, metric in sums.items()}, info

    def _peak_memory(self) -> int:
        """Bytes this worker held at most so far: of its GPUs, or, on the CPU, of the process."""
        if self._device == "cuda":
            import torch

            return sum(torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count()))
        # Not getrusage, whose figure begins with what the process that started this one held.
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    def weights(self) -> Result:
        """The data-free metric: float32 `[num_experts, num_experts]` by `LAYER`."""
        import torch

        from sere.calibration_jobs.capture.experts import ExpertsCall, intercept_experts
        from sere.calibration_jobs.metrics.weights import weight_similarity
        from sere.calibration_jobs.workers.model import pad_rows

        found = {}

        def handle(call: ExpertsCall) -> torch.Tensor:
            found[str(call.layer)] = weight_similarity(call.module)
            return call.run()

        # Any token will do: a forward pass brings each layer's weights into memory.
        with torch.inference_mode(), intercept_experts(self._model, handle):
            self._model(**pad_rows([[0]], self._device), use_cache=False, logits_to_keep=1)
        return found, {}

    def held_out(
        self, rows: Sequence[TokenRow], candidates: Sequence[Any], batch_sizes: Sequence[int], primary_top_k: Sequence[int]
    ) -> Result:
        """Sums of `sere.calibration_jobs.judge.held_out.routing_error` by `LAYER`."""
        from sere.calibration_jobs.judge.held_out import routing_error

        sums = routing_error(
            self._model,
            [row.tokens for row in rows],
            candidates,
            primary_top_k=primary_top_k,
            batch_sizes=batch_sizes,
            block_tokens=self._block_tokens,
            device=self._device,
        )
        return {str(layer): values for layer, values in sums.items()}, {}

    def emulate(self, rows: Sequence[TokenRow], policies: Sequence[Any]) -> Result:
        """Sums of `sere.calibration_jobs.judge.emulation.emulate` as `sums`."""
        from sere.calibration_jobs.judge.emulation import emulate

        return {"sums": emulate(self._model, [row.tokens for row in rows], policies, device=self._device)}, {}
