"""What a calibration job has finished, on disk: results of tasks, the settings they belong to, and who is at work.

Every file is written aside and renamed, carries a checksum of its contents, and belongs to one digest of settings.
"""

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sere.conf.errors import ConfigError

Result = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and what JSON can hold."""


class DamagedResult(ValueError):
    """A file of results that is not what was written. The message names it."""


def write_json(path: Path, values: Any) -> None:
    """Write aside, then rename."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        aside.write_text(json.dumps(values, indent=1, sort_keys=True))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def digest_of(values: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, whatever their order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _checksum(owner: str, name: str, tensors: Mapping[str, Tensor], info: str) -> str:
    digest = hashlib.sha256(f"{owner} {name} {info}".encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in keys)


class JobFolder:
    """The folder of one job. Use as a context manager: while it is open no other process can open it."""

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Args:
        path: The folder; made if it is not there.
        settings: What determines the results, as JSON values. Another job's folder is refused.
        overwrite: Remove what is there.
        """
        self.path = path
        self._settings = json.loads(json.dumps(settings))
        self._overwrite = overwrite
        self.digest = digest_of(self._settings)

    def __enter__(self) -> "JobFolder":
        """Raises:
        ConfigError: if another process works here, or the folder belongs to other settings.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "lock").open("w")
        except OSError as error:
            raise ConfigError(f"cannot write into {self.path} ({error.strerror}): choose another output") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ConfigError(f"another process works in {self.path}: wait for it, or choose another output") from None
        try:
            self._claim()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # The lock goes with the file, also when the process is killed.
        self._lock.close()

    def _claim(self) -> None:
        file = self.path / "job.json"
        if self._overwrite:
            for name in ("job.json", "run.json", "finished.json"):
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / "results", ignore_errors=True)
        if file.is_file():
            try:
                before = json.loads(file.read_text())
            except ValueError:
                before = {}
            if before != self._settings:
                raise ConfigError(
                    f"{self.path} holds another job ({_difference(before, self._settings)}): choose another output, or set "
                    "overwrite=true to throw it away"
                )
        (self.path / "results").mkdir(exist_ok=True)
        for leftover in self.path.glob("results/.*"):
            leftover.unlink()
        if not file.is_file():
            write_json(file, self._settings)

    def _file(self, name: str) -> Path:
        return self.path / "results" / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        return self._file(name).is_file()

    def save(self, name: str, result: Result) -> None:
        """Keep the result of a task."""
        tensors, values = result
        info = json.dumps(values, sort_keys=True)
        tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        file = self._file(name)
        aside = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        metadata = {"owner": self.digest, "info": info, "sha256": _checksum(self.digest, name, tensors, info)}
        try:
            # safetensors needs one tensor at least.
            save_file(tensors or {"empty": torch.zeros(0)}, aside, metadata=metadata)
            with aside.open("rb") as written:
                os.fsync(written.fileno())
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)

    def load(self, name: str) -> Result:
        """Read a result.

        Raises:
            DamagedResult: if the file is not what was saved under this name by this job.
        """
        file = self._file(name)
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {key: opened.get_tensor(key) for key in opened.keys() if key != "empty"}  # noqa: SIM118
            info = metadata["info"]
            right = metadata["owner"] == self.digest and metadata["sha256"] == _checksum(self.digest, name, tensors, info)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise DamagedResult(f"{file} cannot be read ({str(error).splitlines()[0]})") from error
        if not right:
            raise DamagedResult(f"{file} is not what was written there: its checksum does not match")
        return tensors, json.loads(info)

    def discard(self, name: str) -> None:
        """Forget a result, so that it is computed again."""
        self._file(name).unlink(missing_ok=True)

    def note(self, name: str, values: Mapping[str, Any]) -> None:
        """Keep a few values under a name: `run` (the MLflow run), `finished`."""
        write_json(self.path / f"{name}.json", values)

    def noted(self, name: str) -> dict[str, Any] | None:
        """What was noted under a name, or None."""
        try:
            return json.loads((self.path / f"{name}.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
