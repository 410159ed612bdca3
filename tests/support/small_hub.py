"""A hub of models on the loopback: it speaks as much of the hub's API as huggingface_hub needs, and notes requests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "5" * 40


@dataclass
class SmallHub:
    """``repositories`` maps a name to its files, each bytes or a size; ``bodies`` are the files whose bytes were sent,
    in order."""

    url: str
    repositories: dict[str, dict[str, bytes | int]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    bodies: list[str] = field(default_factory=list)


@contextmanager
def running_hub() -> Iterator[SmallHub]:
    """A hub without repositories, on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = SmallHub(f"http://127.0.0.1:{server.server_address[1]}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *_: Any) -> None:
        """Tests read ``requests``."""

    def _answer(self, *, with_body: bool) -> None:
        hub: SmallHub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path).strip("/")
        hub.requests.append(f"{self.command} {path}")
        of_api = path.startswith("api/models/")
        owner, name, *rest = path.removeprefix("api/models/").split("/")
        files = hub.repositories.get(f"{owner}/{name}")
        if files is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body=with_body)
        elif of_api and rest[:1] == ["tree"]:
            everything = "recursive=true" in self.path.lower()
            self._send(200, json.dumps(_entries(files, everything)).encode(), {}, with_body=with_body)
        elif of_api:
            self._send(200, json.dumps({"id": f"{owner}/{name}", "sha": COMMIT}).encode(), {}, with_body=with_body)
        else:
            self._file(files, "/".join(rest[2:]), with_body=with_body)

    def _file(self, files: dict[str, bytes | int], path: str, *, with_body: bool) -> None:
        content = files.get(path)
        if not isinstance(content, bytes):
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body=with_body)
            return
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if with_body:
            self.server.hub.bodies.append(path)  # type: ignore[attr-defined]
        self._send(200, content, headers, with_body=with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _entries(files: dict[str, bytes | int], everything: bool) -> list[dict[str, Any]]:
    """What the hub says of the files at the top of a repository, or of all."""
    return [
        {
            "type": "file",
            "path": path,
            "size": len(content) if isinstance(content, bytes) else content,
            "oid": hashlib.sha1(path.encode()).hexdigest(),
        }
        for path, content in files.items()
        if everything or "/" not in path
    ]
