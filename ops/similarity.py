"""`SimilarityArtifact`: similarities and tables of one model's experts, on disk as one safetensors file with a manifest.

Format 2 added the tables; `similarity_checks.TABLES` says what they are. Format 1, which has none, is read, too.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sere.conf.whole_file import written_whole
from sere.ops.model_digest import ModelIdentity
from sere.ops.similarity_checks import TABLES, SimilarityError, check_manifest, check_matrix, check_tables

__all__ = ["FILE_NAME", "FORMAT_VERSION", "SimilarityArtifact", "SimilarityError"]

FILE_NAME = "similarity.safetensors"
FORMAT_VERSION = 2
_READS = (1, 2)


def _key(layer: int, metric: str) -> str:
    return f"layers.{layer}.{metric}"


@dataclass(frozen=True)
class SimilarityArtifact:
    """Similarity matrices per layer and metric, and the manifest that says what they were computed from.

    Attributes:
        matrices: float32 `[num_experts, num_experts]` by `(layer, metric)`; symmetric, diagonal 1, values in [0, 1].
        manifest: at least `num_experts` (int), `layers` (list of int), `metrics` (list of str) and `model` (dict with
            `name`, `digest` and, of a model of the hub, `commit`); with tables also `tables` (list of their names) and, with
            surrogates, `surrogate_rank` (int).
        tables: by `(layer, name)`, as `similarity_checks.TABLES` says.
    """

    matrices: dict[tuple[int, str], Tensor]
    manifest: dict[str, Any]
    tables: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        return list(self.manifest["layers"])

    @property
    def metrics(self) -> list[str]:
        return list(self.manifest["metrics"])

    @property
    def table_names(self) -> list[str]:
        """Names of the tables that every layer has, similarities aside; empty in format 1."""
        return list(self.manifest.get("tables") or [])

    @property
    def num_experts(self) -> int:
        return self.manifest["num_experts"]

    @property
    def model(self) -> ModelIdentity:
        """Which weights it was computed from, as far as it says."""
        of = self.manifest["model"]
        return ModelIdentity(digest=of.get("digest"), commit=of.get("commit"))

    def matrix(self, layer: int, metric: str) -> Tensor:
        """One layer's matrix, float32 `[num_experts, num_experts]`.

        Raises:
            SimilarityError: if the artifact lacks the layer or the metric.
        """
        if metric not in self.metrics:
            raise SimilarityError(f"the artifact has no metric {metric!r}: it has {', '.join(self.metrics)}")
        if layer not in self.layers:
            raise SimilarityError(
                f"the artifact has no matrix for layer {layer}: it has {self.layers}; calibrate this very model"
            )
        return self.matrices[layer, metric]

    def layer_tables(self, layer: int) -> dict[str, Tensor]:
        """All that is known of a layer, by name: similarities and tables.

        Raises:
            SimilarityError: if the artifact lacks the layer.
        """
        found = {metric: self.matrix(layer, metric) for metric in self.metrics}
        return found | {name: self.tables[layer, name] for name in self.table_names}

    def validate(self) -> "SimilarityArtifact":
        """Return self if every layer has a proper matrix of each metric and each table of the manifest, and nothing else is
        there.

        Raises:
            SimilarityError: otherwise.
        """
        check_manifest(self.manifest)
        expected = {(layer, metric) for layer in self.layers for metric in self.metrics}
        for layer, metric in sorted(expected ^ set(self.matrices)):
            state = "is missing" if (layer, metric) in expected else "is not in the manifest"
            raise SimilarityError(f"the {metric} matrix of layer {layer} {state}: the artifact is damaged")
        for (layer, metric), matrix in self.matrices.items():
            check_matrix(f"the {metric} matrix of layer {layer}", matrix, self.num_experts)
        check_tables(self.tables, self.manifest)
        return self

    def check_model(self, *, num_experts: int, model: ModelIdentity | None, files_to_come: bool = False) -> None:
        """Refuse a model other than the one the artifact was computed from.

        Args:
            num_experts: The model's experts per layer.
            model: What is known of the model; None to compare only `num_experts`.
            files_to_come: The model's files may not be here yet: what only they can tell is not asked now.

        Raises:
            SimilarityError: if they do not match, or nothing is known of both that could be compared.
        """
        name = self.manifest["model"].get("name")
        if num_experts != self.num_experts:
            raise SimilarityError(
                f"the artifact is of {name} with {self.num_experts} experts per layer, the model has {num_experts}: "
                "use the artifact of this model, or make one with `sere calibrate`"
            )
        if model is None:
            return
        known, is_same = self.model, self.model.is_same(model)
        if is_same is None and not (files_to_come and known.digest is not None and model.digest is None):
            raise SimilarityError(
                f"whether the artifact ({name}, {known}) is of this model's weights ({model}) cannot be known: calibrate this "
                "model anew, or set check_model to false"
            )
        if is_same is False:
            # Where the hub has both, the other is one setting away.
            commit = f"choose that commit (model_revision={known.commit}), " if known.commit and model.commit else ""
            raise SimilarityError(
                f"the artifact was computed from other weights ({name}, {known}) than this model's ({model}): {commit}"
                "calibrate this model, or set check_model to false if it is the same model quantised"
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Validate and write one file, in format 2; an existing one is replaced only by a whole one."""
        self.validate()
        target = Path(path)
        tensors = {_key(*key): tensor.contiguous() for key, tensor in {**self.matrices, **self.tables}.items()}
        manifest = {**self.manifest, "format_version": FORMAT_VERSION}
        with written_whole(target) as aside:
            save_file(tensors, aside, metadata={"manifest": json.dumps(manifest, sort_keys=True)})
            # safetensors makes files that only their owner can read; an artifact is shared.
            aside.chmod(0o644)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SimilarityArtifact":
        """Read and validate an artifact.

        Args:
            path: The file, or a folder that holds it as `similarity.safetensors`.

        Raises:
            SimilarityError: if there is no such file, it is no artifact, or its matrices are wrong.
        """
        file = Path(path)
        if file.is_dir():
            file = file / FILE_NAME
        if not file.is_file():
            raise SimilarityError(f"no similarity artifact at {file}: make one with `sere calibrate`")
        try:
            with safe_open(file, framework="pt") as opened:
                manifest = json.loads((opened.metadata() or {})["manifest"])
                matrices, tables = dict[tuple[int, str], Tensor](), dict[tuple[int, str], Tensor]()
                for key in opened.keys():  # noqa: SIM118 (not a dict)
                    _, layer, name = key.split(".")
                    (tables if name in TABLES else matrices)[int(layer), name] = opened.get_tensor(key)
        # What is nested too deeply is a RecursionError; a file that cannot be read, an OSError.
        except (SafetensorError, KeyError, ValueError, TypeError, RecursionError, OSError) as error:
            raise SimilarityError(f"{file} is not a similarity artifact ({error}): make one with `sere calibrate`") from error
        version = manifest.get("format_version") if isinstance(manifest, dict) else None
        if isinstance(manifest, dict) and version not in _READS:
            raise SimilarityError(
                f"{file} has format version {version!r:.20}, this program reads {_READS[0]} to {_READS[-1]}: "
                "compute it again with `sere calibrate`"
            )
        try:
            return cls(matrices, manifest, tables).validate()
        except SimilarityError as error:
            raise SimilarityError(f"{file}: {error}") from None
