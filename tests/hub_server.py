"""A hub of models and datasets on this machine: enough of the Hugging Face hub's HTTP API for its clients to resolve and
download.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

_NAME = "(?:datasets/)?[^/]+/[^/]+"


class Hub:
    """What the server serves. Repositories are folders at commits; refs name commits. A dataset is called `datasets/NAME`."""

    def __init__(self) -> None:
        self.address = ""
        self.requests: list[str] = []
        """Method and path of each request so far."""
        self._commits: dict[str, dict[str, Path]] = {}
        self._refs: dict[str, dict[str, str]] = {}

    def commit(self, name: str, folder: Path, ref: str = "main") -> str:
        """Serve a folder's files as a new commit of a repository, and have a branch or tag point there."""
        commits = self._commits.setdefault(name, {})
        commit = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits[commit] = folder
        self._refs.setdefault(name, {})[ref] = commit
        return commit

    def environment(self, home: Path) -> dict[str, str]:
        """Variables with which a process asks this hub, and keeps what it gets in a folder of its own."""
        return {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def is_known(self, name: str) -> bool:
        return name in self._commits

    def find(self, name: str, revision: str) -> tuple[str, Path] | None:
        """The commit and the folder that a revision names."""
        commit = self._refs[name].get(revision, revision)
        return (commit, self._commits[name][commit]) if commit in self._commits[name] else None


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve a hub, on a free port, for as long as the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(hub))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def asked_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub that this process asks, with a cache of its own."""
    with hub_server() as hub:
        for name, value in {
            "ENDPOINT": hub.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        huggingface_hub.close_session()
        yield hub
    huggingface_hub.close_session()


def _handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer()

        def log_message(self, *_: object) -> None: ...

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            path = path.removeprefix("/api/models") if path.startswith("/api/models/") else path.removeprefix("/api")
            if found := re.fullmatch(rf"/({_NAME})(?:/(revision|tree|paths-info)/([^/]+)(/.+)?)?", path):
                self._describe(found[1], found[2], found[3] or "main", found[4])
            elif found := re.fullmatch(rf"/({_NAME})/resolve/([^/]+)/(.+)", path):
                self._file(found[1], found[2], found[3])
            else:
                self._refuse("", "no such page")

        def _describe(self, name: str, what: str | None, revision: str, below: str | None) -> None:
            at = self._at(name, revision)
            if at is None:
                return
            if below is not None:
                self._refuse("EntryNotFound", "no folder has folders")
                return
            commit, folder = at
            files = sorted(folder.iterdir())
            if what in ("tree", "paths-info"):
                self._send_json([{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)} for f in files])
            else:
                self._send_json({"id": name, "sha": commit, "siblings": [{"rfilename": file.name} for file in files]})

        def _file(self, name: str, revision: str, path: str) -> None:
            at = self._at(name, revision)
            if at is None:
                return
            commit, file = at[0], at[1] / path
            if not file.is_file():
                self._refuse("EntryNotFound", "no such file", {"X-Repo-Commit": commit})
                return
            self._send(200, file.read_bytes(), {"X-Repo-Commit": commit, "ETag": f'"{_etag(file)}"'})

        def _at(self, name: str, revision: str) -> tuple[str, Path] | None:
            if not hub.is_known(name):
                self._refuse("RepoNotFound", "no such repository")
                return None
            at = hub.find(name, revision)
            if at is None:
                self._refuse("RevisionNotFound", "no such revision")
            return at

        def _refuse(self, code: str, message: str, headers: dict[str, str] | None = None) -> None:
            self._send(404, b"", {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

        def _send_json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
