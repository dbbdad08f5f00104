"""Hugging Face datasets: of the hub, or in a folder written by `save_to_disk`."""

import os
from typing import Any

from sere.conf.errors import ConfigError
from sere.pipeline.data.source import InputSpec
from sere.pipeline.runtime.storage import first_line


def is_saved_dataset(data: str) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return os.path.isdir(data) and any(os.path.isfile(f"{data}/{name}") for name in ("state.json", "dataset_dict.json"))


def load_dataset(spec: InputSpec) -> Any:
    """A split of a dataset, from the hub or from a folder.

    Raises:
        ConfigError: if there is no such dataset, split or revision, or it does not load.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        if os.path.isdir(spec.data) and is_saved_dataset(spec.data):
            loaded = datasets.load_from_disk(spec.data)
            return loaded[spec.data_split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(spec.data, split=spec.data_split, revision=spec.data_revision)
    except Exception as error:
        # The hub, the file system and the builders have errors of their own.
        raise ConfigError(
            f"data {spec.data} is no file here, and no Hugging Face dataset with split {spec.data_split!r} that loads "
            f"({type(error).__name__}: {first_line(error)}): check data, data_split and data_revision"
        ) from error
