"""Hugging Face datasets: of the hub, or in a folder written by `save_to_disk`."""

import os
import re
from typing import Any

from sere.conf.errors import ConfigError
from sere.pipeline.data.source import InputSpec
from sere.pipeline.runtime.storage import first_line

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_saved_dataset(data: str) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return os.path.isdir(data) and any(os.path.isfile(f"{data}/{name}") for name in ("state.json", "dataset_dict.json"))


def find_commit(spec: InputSpec) -> str | None:
    """The commit of a hub dataset's revision, asked for once: whoever reads the dataset later is told the commit.

    Where the hub does not answer it is the commit of the rows that are in the local cache.

    Returns:
        The commit; None for a folder.

    Raises:
        ConfigError: as `load_dataset`.
    """
    if os.path.isdir(spec.data):
        return None
    try:
        found = _builder(spec).hash
    except Exception as error:
        raise _unreadable(spec, error) from error
    return found if _COMMIT.fullmatch(found or "") else None


def load_dataset(spec: InputSpec) -> Any:
    """A split of a dataset, from the hub or from a folder.

    Raises:
        ConfigError: if there is no such dataset, split or revision, or it does not load.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        if is_saved_dataset(spec.data):
            loaded = datasets.load_from_disk(spec.data)
            return loaded[spec.data_split] if isinstance(loaded, datasets.DatasetDict) else loaded
        builder = _builder(spec)
        builder.download_and_prepare()
        return builder.as_dataset(spec.data_split)
    except Exception as error:
        # The hub, the file system and the builders have errors of their own.
        raise _unreadable(spec, error) from error


def _builder(spec: InputSpec) -> Any:
    """What makes the dataset: of a hub's, at its commit (`hash`).

    Raises:
        LookupError: if that is another commit than the one that was asked for.
    """
    import datasets

    builder = datasets.load_dataset_builder(spec.data, revision=spec.data_revision)
    wanted = spec.data_revision or ""
    if not os.path.isdir(spec.data) and _COMMIT.fullmatch(wanted) and builder.hash != wanted:
        # Without the hub it is what was cached last, whatever was asked for.
        raise LookupError(f"the hub does not answer, and of the rows in the local cache the last are of commit {builder.hash}")
    return builder


def _unreadable(spec: InputSpec, error: Exception) -> ConfigError:
    return ConfigError(
        f"data {spec.data} is no file here, and no Hugging Face dataset with split {spec.data_split!r} that loads "
        f"({type(error).__name__}: {first_line(error)}): check data, data_split and data_revision"
    )
