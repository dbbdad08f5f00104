"""Results of tasks on disk. Each appears whole or not at all, carries a checksum, and belongs to one job."""

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sere.calibration_jobs.identity import RESULTS
from sere.conf.errors import ConfigError
from sere.pipeline.runtime.storage import Storage, first_line

Result = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and what JSON can hold."""
_log = logging.getLogger(__name__)


def _checksum(owner: str, name: str, tensors: Mapping[str, Tensor], info: str) -> str:
    digest = hashlib.sha256(f"{owner} {name} {info}".encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Results:
    """The results in a job's folder."""

    def __init__(self, storage: Storage, digest: str) -> None:
        """Nothing is read or written yet.

        Args:
            storage: The job's folder, on a local disk.
            digest: Of the job's settings; results carry it, and those of another job are not taken.
        """
        self._storage, self._digest = storage, digest

    def save(self, name: str, result: Result) -> None:
        """Keep the result of a task."""
        tensors, values = result
        info = json.dumps(values, sort_keys=True)
        tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        metadata = {"owner": self._digest, "info": info, "sha256": _checksum(self._digest, name, tensors, info)}
        # safetensors needs one tensor at least.
        self._storage.put(file_of(name), save(tensors or {"empty": torch.zeros(0)}, metadata=metadata))

    def remove(self, name: str) -> None:
        """Remove the result of a task, if there is one."""
        self._storage.remove(file_of(name))

    def load(self, name: str) -> Result | None:
        """The result of a task; None if there is none. A file that is not what was written is moved aside, with a warning.

        Raises:
            ConfigError: if the file cannot be read now, which says nothing of what is in it.
        """
        file = file_of(name)
        try:
            with safe_open(self._storage.locate(file), framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {key: opened.get_tensor(key) for key in opened.keys() if key != "empty"}  # noqa: SIM118
            info = metadata["info"]
            if metadata["owner"] == self._digest and metadata["sha256"] == _checksum(self._digest, name, tensors, info):
                return tensors, json.loads(info)
            reason = "its checksum does not match"
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(
                f"{self._storage.shown}/{file} cannot be read now ({first_line(error)}): nothing was changed, run the same "
                "command again when the disk answers"
            ) from error
        except (SafetensorError, KeyError, ValueError) as error:
            reason = first_line(error)
        aside, shown = self._storage.set_aside(file), self._storage.locate(file)
        _log.warning("%s is not what was written there (%s): it is kept as %s, and computed again", shown, reason, aside)
        return None


def file_of(name: str) -> str:
    """The file of a task's result, in the job's folder."""
    return f"{RESULTS}/{name}.safetensors"
