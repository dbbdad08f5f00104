"""What a generate job leaves beside its parts: a file per driver's session, and the manifest that declares it finished."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from sere.conf.errors import ConfigError
from sere.pipeline.generate.identity import MANIFEST, SESSION_NAMES, SESSIONS
from sere.pipeline.generate.parts import RESULTS, Parts
from sere.pipeline.runtime.storage import Storage


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


def read_sessions(storage: Storage) -> list[Session]:
    """Earlier drivers' sessions, in order."""
    names = [name for name in storage.sizes(SESSIONS) if re.fullmatch(SESSION_NAMES, name.removeprefix(f"{SESSIONS}/"))]
    found = [storage.get_json(name) for name in names]
    return [Session(**values) for values in found if values is not None]


def write_session(storage: Storage, session: Session) -> None:
    """Keep a session's figures, or replace them by later ones."""
    storage.put_json(f"{SESSIONS}/{session.number:04d}.json", dataclasses.asdict(session))


def write_manifest(parts: Parts, values: dict[str, Any]) -> None:
    """Declare the job finished: from now on the results are the files that are there."""
    sizes = parts.storage.sizes(RESULTS)
    parts.storage.put_json(MANIFEST, {**values, "digest": parts.digest, "files": sizes})


def read_manifest(parts: Parts) -> dict[str, Any] | None:
    """The manifest of a finished job; None if the job is not finished, or its files are not those in the manifest.

    Raises:
        ConfigError: if it names a file that is not in the run directory.
    """
    manifest = parts.storage.get_json(MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("digest") != parts.digest:
        return None
    try:
        for name in manifest["files"]:
            parts.storage.locate(name)
    except ValueError as error:
        raise ConfigError(f"manifest.json is not to be trusted: {error}. Move the run directory away") from error
    return manifest if manifest["files"] == parts.storage.sizes(RESULTS) else None
