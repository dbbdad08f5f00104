"""Descriptions of files as JSON, so that files which have not changed are not read once more to describe them."""

import base64
from dataclasses import replace
from typing import Any

import pyarrow as pa

from sere.conf.errors import ConfigError
from sere.pipeline.data.opened import open_input, stamp_of
from sere.pipeline.data.source import Source, SourceFile

# Of what `describe_file` finds: a description of another version is none.
_VERSION = 1


def to_json(file: SourceFile) -> dict[str, Any]:
    """A described file as JSON values; what its folders are called is not among them, that is found anew."""
    assert file.schema is not None
    return {
        "version": _VERSION,
        "name": file.name,
        "path": file.path,
        "num_rows": file.num_rows,
        "fingerprint": file.fingerprint,
        "stamp": file.stamp,
        "schema": base64.b64encode(file.schema.serialize().to_pybytes()).decode(),
        "int96_unit": file.int96_unit,
        "starts": list(file.starts),
        "bounds": {path: list(pair) for path, pair in file.bounds.items()},
    }


def from_json(values: Any) -> SourceFile | None:
    """What `to_json` made; None if it is not that."""
    try:
        if values["version"] != _VERSION:
            return None
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(values["schema"], validate=True)))
        bounds = {str(path): (int(low), int(high)) for path, (low, high) in values["bounds"].items()}
        texts = (str(values[key]) for key in ("name", "path", "fingerprint", "stamp", "int96_unit"))
        name, path, fingerprint, stamp, unit = texts
        starts = tuple(map(int, values.get("starts", ())))
        return SourceFile(name, path, int(values["num_rows"]), fingerprint, schema, bounds, stamp, unit, starts=starts)
    except (LookupError, TypeError, ValueError, AttributeError, pa.ArrowException, OSError):
        # Whatever was kept, the file itself is there to be read.
        return None


def to_keep(source: Source, file: SourceFile) -> dict[str, Any] | None:
    """A file's description, and what it was read as; None where nothing tells cheaply whether it still holds."""
    return to_json(file) | _read_as(source) if file.stamp else None


def recall(source: Source, file: SourceFile, values: Any) -> SourceFile | None:
    """A listed file with what is known of it; None if that is nothing, or the file has changed since."""
    known = from_json(values)
    if known is None or not known.stamp or (known.name, known.path) != (file.name, file.path):
        return None
    if any(values.get(key) != value for key, value in _read_as(source).items()):
        return None
    try:
        filesystem, _ = open_input(source.spec)
        stamp = stamp_of(filesystem, file.path)
    except (ConfigError, OSError):
        # Whoever reads it says so with its name.
        return None
    return replace(known, partition=file.partition) if stamp == known.stamp else None


def _read_as(source: Source) -> dict[str, Any]:
    return {"kind": source.kind, "text_column": source.spec.text_column}
