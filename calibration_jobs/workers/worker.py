"""What runs on a calibration worker: one copy of the model, and the work on a group of shards or a held-out batch at a time.

A plain class; the job makes it a Ray actor. Every result depends on the arguments and the config alone.
"""

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from sere.calibration_jobs.capture.batches import pad_rows
from sere.calibration_jobs.capture.experts import (
    ExpertsCall,
    TokenBlock,
    find_expert_modules,
    intercept_experts,
    observe_experts,
)
from sere.calibration_jobs.judge.candidates import Candidate, Emulated
from sere.calibration_jobs.judge.emulation import emulate
from sere.calibration_jobs.judge.held_out_error import routing_error
from sere.calibration_jobs.metrics import METRIC_CLASSES
from sere.calibration_jobs.metrics.base import ShardSums
from sere.calibration_jobs.metrics.running import RunningSums
from sere.calibration_jobs.metrics.weights import weight_similarity
from sere.calibration_jobs.shards import TokenRow
from sere.calibration_jobs.tables.base import table_specs
from sere.calibration_jobs.tables.surrogates import (
    SurrogateSums,
    leading_directions,
    num_output_directions,
    predicted_directions,
)
from sere.calibration_jobs.workers.model import load_model
from sere.calibration_jobs.workers.offload import offload_folder
from sere.calibration_jobs.workers.results import Result
from sere.calibration_jobs.workers.task import LayerTensors
from sere.conf.errors import ConfigError
from sere.conf.schema import CalibrateConfig
from sere.ops.model_digest import model_identity


class CalibrationWorker:
    """One copy of the model."""

    _model: nn.Module

    def __init__(self, config: CalibrateConfig, block_tokens: int) -> None:
        self._config = config
        self._block_tokens = block_tokens
        self._device = "cuda" if config.num_gpus_per_worker else "cpu"
        self._offload: tempfile.TemporaryDirectory | None = None

    def ready(self) -> None:
        """Load the model. Not in the constructor: an error there would reach the driver as a dead actor."""
        self._offload = offload_folder(self._config.offload_folder)
        self._model = load_model(self._config, self._offload.name)

    def identity(self) -> Result:
        """The `digest` of the files that were loaded."""
        return {}, {"digest": model_identity(self._config.model, self._config.model_revision).digest}

    def directions(self, rows: Sequence[TokenRow]) -> Result:
        """On what surrogates of a wide model see each layer, from some rows that are one forward pass.

        The leading directions of its inputs: `LAYER.hidden_states`, float32 `[num_directions, hidden_size]`; and of each
        expert's outputs those that these predict best: `LAYER.outputs`, `[num_experts, 4 ranks or more, hidden_size]`.
        """
        batch = pad_rows([row.tokens for row in rows], self._device)
        valid, found = batch["attention_mask"].bool().flatten(), dict[str, torch.Tensor]()
        rank, number = self._config.surrogate_rank, self._config.surrogate_directions

        def look(call: ExpertsCall) -> torch.Tensor:
            tokens = call.hidden_states[valid.to(call.hidden_states.device)].float().cpu()
            chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[: 8 * number]
            found[f"{call.layer}.hidden_states"] = leading_directions(tokens[chosen], number)
            return call.run()

        with torch.inference_mode(), intercept_experts(self._model, look):
            self._model(**batch, use_cache=False, logits_to_keep=1)
        modules = find_expert_modules(self._model)
        specs = table_specs({layer: module.num_experts for layer, module in modules.items()}, rank, found)
        # One layer's at a time: with outputs as they are, sums are large.
        at_work: dict[int, SurrogateSums] = {}

        def finish() -> None:
            for layer, sums in at_work.items():
                found[f"{layer}.outputs"] = predicted_directions(sums, num_output_directions(rank))
            at_work.clear()

        def observe(layer: int, block: TokenBlock) -> None:
            if layer not in at_work:
                finish()
                at_work[layer] = SurrogateSums(specs[layer])
            at_work[layer].update(block)

        observe_experts(self._model, [batch], lambda *_: None, block_tokens=self._block_tokens, observe_block=observe)
        finish()
        return found, {}

    def sums(
        self,
        shards: Sequence[Sequence[TokenRow]],
        domains: Sequence[str],
        tables: Sequence[str] = (),
        directions: Mapping[str, torch.Tensor] | None = None,
        checkpoint_s: float = math.inf,
        begun: Result | None = None,
    ) -> Iterator[Result]:
        """Sums of all metrics over the shards of a group, in their order, as `ShardSums`: of all tokens, and, if there are
        several domains, of each one's tokens; and of the tables, of all tokens.

        Yields one after every shard: the last has the group's sums, others have none, or, at most every so many seconds, all
        that it takes to go on. To be used before the next is asked for.

        Args:
            shards: Rows of each.
            domains: Their domains.
            tables: Names of tables.
            directions: On which surrogates see inputs and outputs; None: as they are.
            checkpoint_s: Seconds between sums that are not the last.
            begun: The last one that had sums, by another worker; None: it begins.
        """
        counts = {layer: module.num_experts for layer, module in find_expert_modules(self._model).items()}
        specs = table_specs(counts, self._config.surrogate_rank, directions)
        metrics = [metric for metric in self._config.metrics if metric in METRIC_CLASSES]
        running = RunningSums(specs, metrics, tables, ShardSums.from_result(begun) if begun is not None else None)
        sent = time.monotonic()
        for rows in shards[running.num_shards :]:
            self._add(running, rows, domains, has_tables=bool(tables))
            peak = self._peak_memory()
            if running.num_shards == len(shards):
                yield running.finished(peak).to_result()
            elif time.monotonic() - sent < checkpoint_s:
                yield running.progress(peak).to_result()
            else:
                yield running.checkpoint(peak).to_result()
                sent = time.monotonic()

    def _add(self, running: RunningSums, rows: Sequence[TokenRow], domains: Sequence[str], *, has_tables: bool) -> None:
        """Add a shard to a group's sums."""
        started = time.monotonic()
        of_tokens = torch.tensor([domains.index(row.domain) for row in rows for _ in row.tokens])
        observe_experts(
            self._model,
            self._batches(rows),
            lambda layer, outputs, tokens: running.add_outputs(layer, outputs, of_tokens[tokens] if len(domains) > 1 else None),
            block_tokens=self._block_tokens,
            observe_block=running.add_block if has_tables else None,
        )
        counts = torch.bincount(of_tokens, minlength=len(domains)).tolist()
        running.end_shard({None: len(of_tokens), **dict(enumerate(counts))}, time.monotonic() - started)
        layer = running.not_finite()
        if layer is not None:
            raise ConfigError(
                f"outputs of the experts of layer {layer} are not finite in {self._config.dtype}: try dtype=float32 or "
                "dtype=bfloat16, and check the model"
            )

    def _batches(self, rows: Sequence[TokenRow]) -> list[dict[str, torch.Tensor]]:
        size = self._config.batch_size
        return [
            pad_rows([row.tokens for row in rows[start : start + size]], self._device) for start in range(0, len(rows), size)
        ]

    def _peak_memory(self) -> int:
        """Bytes this worker held at most so far: of its GPUs, or, on the CPU, of the process."""
        if self._device == "cuda":
            return sum(torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count()))
        # Not getrusage, whose figure begins with what the process that started this one held.
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    def weights(self) -> Result:
        """The data-free metric, as `LayerTensors`: float32 `[num_experts, num_experts]`."""
        found = {}

        def handle(call: ExpertsCall) -> torch.Tensor:
            found[call.layer] = weight_similarity(call.module)
            return call.run()

        # Any token will do: a forward pass brings each layer's weights into memory.
        with torch.inference_mode(), intercept_experts(self._model, handle):
            self._model(**pad_rows([[0]], self._device), use_cache=False, logits_to_keep=1)
        return LayerTensors(found).to_result()

    def held_out(
        self,
        rows: Sequence[TokenRow],
        candidates: Sequence[Candidate],
        batch_sizes: Sequence[int],
        primary_top_k: Sequence[int],
    ) -> Result:
        """Sums of `sere.calibration_jobs.judge.held_out_error.routing_error`, as `LayerTensors`."""
        sums = routing_error(
            self._model,
            [row.tokens for row in rows],
            candidates,
            primary_top_k=primary_top_k,
            batch_sizes=batch_sizes,
            block_tokens=self._block_tokens,
            device=self._device,
        )
        return LayerTensors(sums).to_result()

    def emulate(self, rows: Sequence[TokenRow], policies: Sequence[Emulated]) -> Result:
        """Sums of `sere.calibration_jobs.judge.emulation.emulate` as `sums`."""
        return {"sums": emulate(self._model, [row.tokens for row in rows], policies, device=self._device)}, {}
