"""The calibration job: Ray actors run batches of text through the model, their sums are merged into one artifact."""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration_jobs.cluster import start_ray
from calibration_jobs.inputs import data_digest, read_texts
from calibration_jobs.models import make_empty_model, read_model_config
from calibration_jobs.tracking import NullTracker, track
from conf.schema import CalibrateConfig, ConfigError

if TYPE_CHECKING:
    from ops.similarity import SimilarityArtifact


class CalibrationWorker:
    """One copy of the model and the sums of the batches it was given. A plain class: the job makes it a Ray actor."""

    def __init__(self, config: CalibrateConfig) -> None:
        import torch
        import transformers

        from calibration_jobs.capture import ExpertCapture
        from calibration_jobs.metrics import METRIC_CLASSES, SimilarityMetric

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.device = "cuda" if config.num_gpus_per_worker else "cpu"
        self.config = config
        model = transformers.AutoModelForCausalLM.from_pretrained(
            config.model, dtype=getattr(torch, config.dtype), trust_remote_code=config.trust_remote_code
        )
        # On the CPU the eager path is about 40 times slower.
        model.set_experts_implementation("grouped_mm")
        self.model = model.eval().to(self.device)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        self.capture = ExpertCapture(self.model, self._observe)
        self.sums: dict[tuple[int, str], SimilarityMetric] = {
            (layer, metric): METRIC_CLASSES[metric](module.num_experts)
            for layer, module in self.capture.experts.items()
            for metric in config.metrics
        }

    def _observe(self, layer: int, outputs: Any) -> None:
        for metric in self.config.metrics:
            self.sums[layer, metric].update(outputs)

    def run(self, texts: list[str]) -> int:
        """Add one batch; returns its number of tokens, padding left out."""
        batch = self.tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, max_length=self.config.sequence_length
        ).to(self.device)
        self.capture.run(batch["input_ids"], batch["attention_mask"])
        return int(batch["attention_mask"].sum())

    def result(self) -> dict[tuple[int, str], Any]:
        """The sums so far."""
        return self.sums


def _run_batches(config: CalibrateConfig, texts: list[str]) -> dict[tuple[int, str], Any]:
    """All batches over all workers; returns the merged sums."""
    import ray
    from ray.util import ActorPool
    from rich.progress import track as progress

    batches = [texts[i : i + config.batch_size] for i in range(0, len(texts), config.batch_size)]
    actor = ray.remote(num_cpus=config.num_cpus_per_worker, num_gpus=config.num_gpus_per_worker)(CalibrationWorker)
    workers = [actor.remote(config) for _ in range(min(config.num_workers, len(batches)))]
    try:
        pool = ActorPool(workers)
        done = pool.map_unordered(lambda worker, batch: worker.run.remote(batch), batches)
        for _ in progress(done, description="Calibrating", total=len(batches)):
            pass
        merged: dict[tuple[int, str], Any] = {}
        for sums in ray.get([worker.result.remote() for worker in workers]):
            for key, metric in sums.items():
                if key in merged:
                    merged[key].merge(metric)
                else:
                    merged[key] = metric
        return merged
    finally:
        for worker in workers:
            ray.kill(worker)


def _make_artifact(config: CalibrateConfig, texts: list[str], sums: dict[tuple[int, str], Any]) -> "SimilarityArtifact":
    import torch
    import transformers

    from ops.digest import model_digest
    from ops.similarity import SimilarityArtifact

    layers = sorted({layer for layer, _ in sums})
    first = sums[layers[0], config.metrics[0]]
    settings = json.dumps(dataclasses.asdict(config), sort_keys=True)
    manifest = {
        "num_experts": first.sums.shape[0],
        "layers": layers,
        "metrics": list(config.metrics),
        "model": {"name": config.model, "digest": model_digest(config.model)},
        "data": {"source": config.data, "digest": data_digest(texts), "num_sequences": len(texts)},
        "num_tokens": first.num_tokens,
        "config_digest": hashlib.sha256(settings.encode()).hexdigest(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    return SimilarityArtifact({key: metric.finalize() for key, metric in sums.items()}, manifest)


def _off_diagonal(matrix: Any) -> Any:
    import torch

    return matrix[~torch.eye(matrix.shape[0], dtype=torch.bool)]


def _heatmaps(artifact: "SimilarityArtifact") -> Iterator[tuple[int, Any]]:
    """One picture per layer, a panel per metric."""
    from matplotlib.figure import Figure

    for layer in artifact.layers:
        figure = Figure(figsize=(4.2 * len(artifact.metrics), 4), layout="constrained")
        panels = figure.subplots(1, len(artifact.metrics), squeeze=False)[0]
        for panel, metric in zip(panels, artifact.metrics, strict=True):
            image = panel.imshow(artifact.matrix(layer, metric).numpy(), vmin=0, vmax=1, cmap="viridis")
            panel.set(title=f"layer {layer}, {metric}", xlabel="replacement", ylabel="expert replaced")
        figure.colorbar(image, ax=list(panels), shrink=0.8)
        yield layer, figure


def _record(tracker: NullTracker, config: CalibrateConfig, artifact: "SimilarityArtifact", file: Path) -> str | None:
    for layer in artifact.layers:
        values = {}
        for metric in artifact.metrics:
            off_diagonal = _off_diagonal(artifact.matrix(layer, metric))
            values |= {
                f"{metric}/off_diagonal_mean": off_diagonal.mean().item(),
                f"{metric}/off_diagonal_min": off_diagonal.min().item(),
                f"{metric}/off_diagonal_max": off_diagonal.max().item(),
            }
        tracker.log_metrics(values, step=layer)
    for layer, figure in _heatmaps(artifact):
        tracker.log_figure(figure, f"heatmaps/layer_{layer:03d}.png")
    manifest = artifact.manifest
    tags = {"model": config.model, "num_tokens": str(manifest["num_tokens"]), "metrics": ",".join(artifact.metrics)}
    return tracker.register_artifact(file, name=config.registered_model, alias=config.alias, tags=tags)


def calibrate(config: CalibrateConfig) -> tuple[Path, str | None]:
    """Run the job.

    Returns:
        The artifact's file, and its version in the MLflow registry (None without tracking).

    Raises:
        ConfigError: if the model or the data cannot be used.
    """
    from calibration_jobs.capture import find_expert_modules
    from ops.digest import model_digest
    from ops.similarity import FILE_NAME

    output = Path(config.output)
    if output.name != FILE_NAME:
        raise ConfigError(f"output must be a path ending in {FILE_NAME}, got {config.output}")
    trust = config.trust_remote_code
    model_config = read_model_config(config.model, trust_remote_code=trust)
    # Before any worker starts: is it a model whose experts can be captured?
    find_expert_modules(make_empty_model(model_config, trust_remote_code=trust))
    texts = read_texts(config)
    start_ray(config.num_workers * config.num_cpus_per_worker)
    with track(config.tracking, kind="calibrate", default_name="calibrate") as tracker:
        tracker.log_config(config)
        tracker.log_params({"model_digest": model_digest(config.model)})
        tracker.log_dataset(source=config.data, digest=data_digest(texts), num_rows=len(texts), context="calibration")
        artifact = _make_artifact(config, texts, _run_batches(config, texts))
        file = artifact.save(output)
        tracker.log_metrics({"num_tokens": artifact.manifest["num_tokens"], "num_sequences": len(texts)})
        return file, _record(tracker, config, artifact, file)
