"""What a generate job leaves beside its parts: a file per driver's session, and the manifest that declares it finished."""

import dataclasses
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sere.conf.errors import ConfigError, TryAgainError
from sere.pipeline.generate.identity import INPUT, LOGS, MANIFEST, SESSION_NAMES, SESSIONS
from sere.pipeline.generate.parts import RESULTS, Parts
from sere.pipeline.runtime.storage import Storage

# How the names of sessions' files, logs and parts begin.
_SESSION_OF = r"(?:part-s|s)?(\d+)[-.]"
_log = logging.getLogger(__name__)


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
    prefix_cache_queries: int = 0
    """Tokens of prompts that were looked for in the engines' prefix caches."""
    prefix_cache_hits: int = 0
    """Of those, tokens that were there."""
    counters: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    """SERE's counters by layer, summed over replicas."""
    conditions: dict[str, Any] = dataclasses.field(default_factory=dict)
    """See `sere.pipeline.generate.identity.conditions`."""


_FIELDS = {entry.name for entry in dataclasses.fields(Session)}


def read_sessions(storage: Storage) -> list[Session]:
    """Earlier drivers' sessions, in order. Of one whose file is damaged the figures are lost, and nothing else."""
    names = [name for name in storage.sizes(SESSIONS) if re.fullmatch(SESSION_NAMES, name.removeprefix(f"{SESSIONS}/"))]
    sessions = []
    for name in names:
        values = storage.get_json(name)
        if not isinstance(values, dict) or "number" not in values:
            _log.warning("%s/%s is damaged: the figures of that session are left out", storage.shown, name)
            continue
        # A later version's has more.
        sessions.append(Session(**{key: value for key, value in values.items() if key in _FIELDS}))
    return sessions


def known_input(storage: Storage) -> dict[str, Any]:
    """What an earlier session has noted of the input's files, by name."""
    known = storage.get_json(INPUT)
    return known if isinstance(known, dict) else {}


def next_session(storage: Storage) -> int:
    """A number that no session has had, by the names of all that sessions leave."""
    names = [name.rsplit("/", 1)[-1] for folder in (SESSIONS, RESULTS, LOGS) for name in storage.sizes(folder)]
    return 1 + max((int(found[1]) for name in names if (found := re.match(_SESSION_OF, name))), default=0)


def write_session(storage: Storage, session: Session) -> None:
    """Keep a session's figures, or replace them by later ones."""
    storage.put_json(f"{SESSIONS}/{session.number:04d}.json", dataclasses.asdict(session))


def write_manifest(parts: Parts, values: dict[str, Any], names: Collection[str]) -> None:
    """Declare the job finished: from now on the results are these files, and no others.

    Raises:
        TryAgainError: if one of them is gone.
    """
    sizes = parts.storage.sizes(RESULTS)
    if gone := sorted(set(names) - set(sizes)):
        raise TryAgainError(f"{parts.storage.shown}/{gone[0]} is gone: run the same command again, its rows are done anew")
    files = {name: sizes[name] for name in sorted(names)}
    parts.storage.put_json(MANIFEST, {**values, "digest": parts.digest, "files": files})


def read_manifest(parts: Parts) -> dict[str, Any] | None:
    """The manifest of a finished job; None if the job is not finished, or a file is not as the manifest has it.

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
    sizes = parts.storage.sizes(RESULTS)
    return manifest if all(sizes.get(name) == size for name, size in manifest["files"].items()) else None


def sweep(parts: Parts, manifest: Mapping[str, Any]) -> None:
    """Remove parts that are none of a finished job's: what the end did not get to, or a lost replica wrote after it."""
    left = [name for name in parts.names() if name not in manifest["files"]]
    if left:
        _log.warning("%d parts in %s are copies that the results do not need, and are removed", len(left), parts.storage.shown)
    parts.storage.remove_all(left)
