"""What runs on a calibration worker: one copy of the model, and the work on one shard or one held-out batch at a time.

A plain class; the job makes it a Ray actor. Every result depends on the arguments and the config alone.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence

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
from sere.calibration_jobs.metrics.base import ShardSums, SumKey, TableKey
from sere.calibration_jobs.metrics.weights import weight_similarity
from sere.calibration_jobs.shards import TokenRow
from sere.calibration_jobs.tables import TABLE_CLASSES
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
        rows: Sequence[TokenRow],
        domains: Sequence[str],
        tables: Sequence[str] = (),
        directions: Mapping[str, torch.Tensor] | None = None,
    ) -> Result:
        """Sums of all metrics over one shard, as `ShardSums`: of all tokens, and, if there are several domains, of each one's
        tokens; and of the tables, of all tokens."""
        started = time.monotonic()
        metrics = [metric for metric in self._config.metrics if metric in METRIC_CLASSES]
        token_domains = torch.tensor([domains.index(row.domain) for row in rows for _ in row.tokens])
        counts = torch.bincount(token_domains, minlength=len(domains)).tolist()
        parts = [None] + [number for number in range(len(domains)) if len(domains) > 1 and counts[number]]
        sums = {
            SumKey(layer, metric, part): METRIC_CLASSES[metric](module.num_experts)
            for layer, module in find_expert_modules(self._model).items()
            for metric in metrics
            for part in parts
        }

        modules = find_expert_modules(self._model)
        counts_of = {layer: module.num_experts for layer, module in modules.items()}
        specs = table_specs(counts_of, self._config.surrogate_rank, directions)
        of_tables = {(layer, table): TABLE_CLASSES[table](specs[layer]) for layer in modules for table in tables}

        def observe_block(layer: int, block: TokenBlock) -> None:
            for table in tables:
                of_tables[layer, table].update(block)

        def observe(layer: int, outputs: torch.Tensor, tokens: torch.Tensor) -> None:
            for part in parts:
                own = outputs if part is None else outputs[:, (token_domains[tokens] == part).to(outputs.device)]
                for metric in metrics:
                    sums[SumKey(layer, metric, part)].update(own)

        observe_experts(
            self._model,
            self._batches(rows),
            observe,
            block_tokens=self._block_tokens,
            observe_block=observe_block if tables else None,
        )
        made = [(key.layer, metric.sums) for key, metric in sums.items()]
        made += [(layer, value) for (layer, _), part in of_tables.items() for value in part.sums.values()]
        for layer, value in made:
            if not value.isfinite().all():
                raise ConfigError(
                    f"outputs of the experts of layer {layer} are not finite in {self._config.dtype}: try dtype=float32 or "
                    "dtype=bfloat16, and check the model"
                )
        return ShardSums(
            sums={key: metric.sums for key, metric in sums.items()},
            # Half the bytes: what is summed in float64 is kept to seven digits.
            tables={
                TableKey(layer, table, name): value.float()
                for (layer, table), part in of_tables.items()
                for name, value in part.sums.items()
            },
            num_tokens={None: sum(counts), **dict(enumerate(counts))},
            elapsed_s=time.monotonic() - started,
            peak_memory_bytes=self._peak_memory(),
        ).to_result()

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
