"""Which files there are, unread."""

import glob
import os
import re
from dataclasses import replace
from typing import Any

from sere.conf.errors import ConfigError
from sere.conf.masking import mask_uri
from sere.pipeline.data.hive import partition_of
from sere.pipeline.data.hub import find_commit, is_saved_dataset
from sere.pipeline.data.opened import open_input
from sere.pipeline.data.source import InputSpec, Kind, Source, SourceFile
from sere.pipeline.runtime.storage import first_line

_SUFFIXES: dict[str, Kind] = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".text": "text",
}
_COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")


def find_sources(spec: InputSpec) -> Source:
    """List the input's files, unread; of a hub dataset's revision find the commit.

    Raises:
        ConfigError: if there are none, or of several kinds.
    """
    if spec.data_format == "huggingface" or (spec.data_format == "auto" and is_saved_dataset(spec.data)):
        return _dataset(spec)
    spec = replace(spec, data=_seen_from_anywhere(spec.data))
    filesystem, root = open_input(spec)
    try:
        base, paths = _list(filesystem, root)
    except Exception as error:
        # Every kind of storage has errors of its own.
        raise ConfigError(f"data {mask_uri(spec.data)} cannot be listed ({mask_uri(first_line(error))})") from error
    if not paths:
        if spec.data_format == "auto" and re.fullmatch(r"[\w.-]+/[\w.-]+", spec.data) and "." not in spec.data.split("/")[1]:
            # Not a path here: a dataset of the hub.
            return _dataset(spec)
        raise ConfigError(
            f"no data at {mask_uri(spec.data)} (seen from {os.getcwd()}): give a parquet, JSONL, CSV or text file, a folder "
            "of them, a glob, a Hugging Face dataset, or an fsspec URI of one of these"
        )
    kind, *others = {_kind(path) if spec.data_format == "auto" else spec.data_format for path in paths}
    if kind is None or others:
        shown = ", ".join(sorted({os.path.splitext(path)[1] or "no suffix" for path in paths}))
        raise ConfigError(
            f"{mask_uri(spec.data)} has files of several or unknown kinds ({shown}): set data_format, or give a glob"
        )
    shared = os.path.dirname(paths[0]) if len(paths) == 1 else os.path.commonpath(paths)
    files = [SourceFile(os.path.relpath(path, shared), path, partition=partition_of(path, base)) for path in paths]
    return Source(kind, tuple(sorted(files, key=lambda file: file.name)), spec)


def _dataset(spec: InputSpec) -> Source:
    commit = find_commit(spec)
    # From here on it is the same commit for all who read it.
    spec = replace(spec, data_revision=commit or spec.data_revision)
    return Source("huggingface", (SourceFile(spec.data_split, spec.data),), spec, commit=commit)


def _list(filesystem: Any, root: str) -> tuple[str, list[str]]:
    """The files, and the folder below which what folders are called was found rather than given."""
    if glob.has_magic(root) and not filesystem.exists(root):
        parts = root.split("/")
        given = next(number for number, part in enumerate(parts) if glob.has_magic(part))
        return "/".join(parts[:given]), sorted(path for path in filesystem.glob(root) if filesystem.isfile(path))
    if filesystem.isfile(root):
        return os.path.dirname(root), [root]
    if not filesystem.isdir(root):
        return root, []
    found = [path for path in filesystem.find(root) if _kind(path) is not None]
    below = len(root.rstrip("/")) + 1 if root else 0
    return root, sorted(path for path in found if not any(part[:1] in "._" for part in path[below:].split("/")))


def _seen_from_anywhere(data: str) -> str:
    """A chain of URIs whose last is a local path, with that one absolute: workers have other working directories."""
    *chain, last = data.split("::")
    return "::".join([*chain, os.path.abspath(last)]) if chain and "://" not in last and os.path.exists(last) else data


def _kind(path: str) -> Kind | None:
    stem, suffix = os.path.splitext(path.lower())
    return _SUFFIXES.get(os.path.splitext(stem)[1] if suffix in _COMPRESSIONS else suffix)
