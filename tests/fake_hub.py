"""A hub on this machine: the few addresses that huggingface_hub asks for a listing and for files."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_api

__all__ = ["FakeHub", "commit_of", "fake_hub"]


def commit_of(revision: str) -> str:
    """The commit that a branch of the fake hub means."""
    return hashlib.sha1(revision.encode()).hexdigest()


class FakeHub:
    """Repositories as "org/name" -> revision -> file -> content, and what was asked of the hub."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.fetched: list[str] = []
        self.commits: set[str] = set()  # of the files that were fetched

    def add(self, repository: str, *sources: Path | Mapping[str, bytes], revision: str = "main") -> None:
        """A revision of a repository: the files of folders, and others by name."""
        content: dict[str, bytes] = {}
        for source in sources:
            files = {p.name: p.read_bytes() for p in source.iterdir()} if isinstance(source, Path) else source
            content.update(files)
        self.repositories.setdefault(repository, {})[revision] = content

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a request."""
        path = path.partition("?")[0].replace("%2F", "/")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            repository, kind, revision = found[1], found[2], found[3] or "main"
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository, kind, revision = found[1], found[3], found[2]
        else:
            return 404, {}, b""
        revisions = self.repositories.get(repository)
        if revisions is None:
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
        name = next((r for r in revisions if revision in (r, commit_of(r))), None)
        if name is None:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b""
        if "/resolve/" in path:
            return self._file(repository, revisions[name], name, kind)
        sizes = {file: (len(data), hashlib.sha1(data).hexdigest()) for file, data in revisions[name].items()}
        if kind == "tree":
            tree: Any = [{"type": "file", "path": f, "size": n, "oid": oid} for f, (n, oid) in sizes.items()]
        else:
            siblings = [{"rfilename": f, "size": n, "blobId": oid} for f, (n, oid) in sizes.items()]
            tree = {"id": repository, "sha": commit_of(name), "siblings": siblings}
        return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()

    def _file(
        self, repository: str, files: dict[str, bytes], revision: str, name: str
    ) -> tuple[int, dict[str, str], bytes]:
        if repository in self.gated:
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b""
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        self.commits.add(commit_of(revision))
        etag = hashlib.sha1(files[name]).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit_of(revision)}, files[name]


@contextmanager
def fake_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Everything that huggingface_hub asks in this process goes to the fake hub, with an empty cache."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._send(body=False)

        def do_GET(self) -> None:
            self._send(body=True)

        def _send(self, body: bool) -> None:
            status, headers, data = hub.answer(self.path)
            if body and status == 200 and "/resolve/" in self.path:
                hub.fetched.append(self.path.split("/", 5)[5])
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hf_api.api, "endpoint", url)
        yield hub
        server.shutdown()
