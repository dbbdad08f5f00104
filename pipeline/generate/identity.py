"""What a generate job is: the settings that determine its results, the artifact it uses, and what of it was done before."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere.conf.errors import ConfigError
from sere.conf.masking import mask_values
from sere.conf.schema import GenerateConfig, RerouteConfig
from sere.pipeline.generate.parts import RESULTS, RunFolder

SIMILARITY = "similarity.safetensors"
"""The artifact, in the run directory: every node finds it there."""
# What may change between a run and its continuation, as it does not change what a row's answer is made with.
_FREE = (
    "output",
    "overwrite",
    "storage_options",
    "tracking",
    "preserve_order",
    "checkpoint_rows",
    "checkpoint_interval_s",
    "max_retries",
    "max_error_ratio",
    "reference_column",
    "task_column",
)
_FREE_OF_ENGINE = (
    "num_replicas",
    "max_replicas",
    "gpus_per_replica",
    "cpus_per_replica",
    "accelerator_type",
    "kv_cache_gib",
    "executor",
)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def job_settings(config: GenerateConfig, *, model_digest: str, fingerprints: dict[str, Any], artifact: bytes) -> dict[str, Any]:
    """All that a row's answer depends on, as flat JSON values: of two jobs with equal settings one can go on with the other."""
    values = dataclasses.asdict(config)
    for key in _FREE:
        del values[key]
    for key in _FREE_OF_ENGINE:
        del values["engine"][key]
    if values["reroute"] is not None:
        # The digest says which artifact it is, wherever it lies.
        for key in ("similarity", "stats_dir"):
            del values["reroute"][key]
    settings = flatten(mask_values(values)) | {"model_digest": model_digest}
    if artifact:
        settings["similarity_digest"] = hashlib.sha256(artifact).hexdigest()
    settings |= {f"data/{name}": value for name, value in fingerprints.items()}
    return json.loads(json.dumps(settings))


def settings_digest(settings: dict[str, Any]) -> str:
    """SHA-256 of JSON values, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def read_similarity(reroute: RerouteConfig | None, path: Path | None) -> bytes:
    """The artifact's bytes; empty where none is used."""
    if reroute is None or reroute.policy != "sere" or path is None:
        return b""
    try:
        return (path / SIMILARITY if path.is_dir() else path).read_bytes()
    except OSError as error:
        raise ConfigError(f"artifact {path} cannot be read ({error.strerror}): give the path of one") from error


@dataclass
class Session:
    """One driver's share of the work. Its figures outlive it in `sessions/`."""

    number: int
    elapsed_s: float = 0.0
    generation_s: float = 0.0
    """From the first request to the last answer."""
    working_s: float = 0.0
    """From the first replica that was ready until all that could be done was written."""
    startup_s: float = 0.0
    """Until the first replica was ready."""
    generated_tokens: int = 0
    num_rows: int = 0
    num_replaced: int = 0
    counters: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    """SERE's counters by layer, summed over replicas."""


def read_sessions(folder: RunFolder) -> list[Session]:
    """Earlier drivers' sessions, in order."""
    found = [folder.storage.get_json(name) for name in folder.storage.sizes("sessions")]
    return [Session(**values) for values in found if values is not None]


def write_session(folder: RunFolder, session: Session) -> None:
    folder.storage.put_json(f"sessions/{session.number:04d}.json", dataclasses.asdict(session))


def write_manifest(folder: RunFolder, values: dict[str, Any]) -> None:
    """Declare the job finished: from now on the results are the files that are there."""
    sizes = folder.storage.sizes(RESULTS)
    folder.storage.put_json("manifest.json", {**values, "digest": folder.digest, "files": sizes})


def read_manifest(folder: RunFolder) -> dict[str, Any] | None:
    """The manifest of a finished job; None if the job is not finished, or its files are not those in the manifest.

    Raises:
        ConfigError: if it names a file that is not in the run directory.
    """
    manifest = folder.storage.get_json("manifest.json")
    if not isinstance(manifest, dict) or manifest.get("digest") != folder.digest:
        return None
    try:
        for name in manifest["files"]:
            folder.storage.locate(name)
    except ValueError as error:
        raise ConfigError(f"manifest.json is not to be trusted: {error}. Move the run directory away") from error
    return manifest if manifest["files"] == folder.storage.sizes(RESULTS) else None
