"""A Hub on this machine: a folder per repository, served over HTTP as huggingface_hub expects it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest


class FakeHub:
    """Repositories are `root/<user>/<name>/`; later additions are newer. `log` holds the requested paths."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repositories: list[str] = []
        self.log: list[str] = []

    def add(self, repo_id: str, source: Path) -> str:
        """Publish the files of a directory; gives the commit."""
        target = self.root / repo_id
        target.mkdir(parents=True)
        for path in source.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        self.repositories.append(repo_id)
        return self.commit(repo_id)

    def commit(self, repo_id: str) -> str:
        return hashlib.sha1(repo_id.encode()).hexdigest()

    def info(self, repo_id: str) -> dict[str, Any]:
        files = sorted(path.name for path in (self.root / repo_id).iterdir())
        return {
            "id": repo_id,
            "sha": self.commit(repo_id),
            "lastModified": f"2026-01-{self.repositories.index(repo_id) + 1:02d}T00:00:00.000Z",
            "siblings": [{"rfilename": name} for name in files],
        }

    def answer(self, url: str) -> tuple[int, dict[str, str], bytes]:
        parsed = urlparse(url)
        parts = parsed.path.strip("/").split("/")
        if parsed.path == "/api/models":
            author = parse_qs(parsed.query)["author"][0]
            newest_first = [r for r in reversed(self.repositories) if r.startswith(f"{author}/")]
            return 200, {}, json.dumps([self.info(r) for r in newest_first]).encode()
        repo_id = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        if repo_id not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if "revision" in parts and parts[-1] not in ("main", self.commit(repo_id)):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if "tree" in parts:
            return (
                200,
                {},
                json.dumps([self._tree_entry(p) for p in (self.root / repo_id).iterdir()]).encode(),
            )
        if parts[0] == "api":
            return 200, {}, json.dumps(self.info(repo_id)).encode()
        body = (self.root / repo_id / parts[-1]).read_bytes()
        etag = hashlib.sha1(body).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit(repo_id)}, body

    def _tree_entry(self, path: Path) -> dict[str, Any]:
        body = path.read_bytes()
        return {"type": "file", "path": path.name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}


@contextmanager
def serve(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Serve a fake Hub, and point huggingface_hub (online, with an empty cache) at it."""
    from huggingface_hub import constants

    hub = FakeHub(root / "hub")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.log.append(self.path)
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root / "hub-cache"))
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
