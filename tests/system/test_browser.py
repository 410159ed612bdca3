"""A page from another port, in a real browser: it may call the server if its origin is allowed, and else may not."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.server import RunningServer, running_server
from support.tiny import endless_model_folder

pytestmark = pytest.mark.system

PAGE = (Path(__file__).parents[1] / "data" / "browser_page.html").read_bytes()
SECONDS = 120
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


class Site:
    """Serves the page on a port of its own, and takes what the page has seen."""

    def __init__(self) -> None:
        seen: queue.Queue[dict[str, Any]] = queue.Queue()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(PAGE if self.path.startswith("/?") else b"")

            def do_POST(self) -> None:
                seen.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                self.answer(b"")

            def answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/html")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Nobody reads it."""

        self.seen = seen
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self.server.server_port}"


@contextmanager
def site() -> Iterator[Site]:
    made = Site()
    threading.Thread(target=made.server.serve_forever, daemon=True).start()
    try:
        yield made
    finally:
        made.server.shutdown()
        made.server.server_close()


def seen_by_the_page(page: Site, server: RunningServer, profile: Path) -> dict[str, Any]:
    """Open the page in a browser with a new profile; what the page tells."""
    browser = shutil.which("chromium")
    assert browser, "chromium is not installed: .ci/run installs it"
    command = [browser, *OPTIONS, f"--user-data-dir={profile}", f"{page.origin}/?server={server.url}"]
    with (profile.parent / f"{profile.name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            return page.seen.get(timeout=SECONDS)
        finally:
            # The browser is many processes.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_page_calls_the_server_if_its_origin_is_allowed(tmp_path: Path) -> None:
    model = endless_model_folder(tmp_path / "model", num_hidden_layers=1)
    lenient = ["generationConfig.thinkingConfig.thinkingBudget"]
    entry = {"source": str(model), "aliases": ["gemini-*"], "lenient": lenient}
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"models": {"endless": entry}}))
    with site() as allowed, site() as stranger:
        options = ["--models", str(tmp_path / "models.yaml"), "--cors-origin", allowed.origin]
        with running_server(tmp_path, *options) as server:
            seen = seen_by_the_page(allowed, server, tmp_path / "allowed")
            assert set(seen) == {"answer", "stream", "upload", "error"}
            assert seen["answer"]["status"] == 200
            assert len(seen["answer"]["text"]) == 8
            assert seen["answer"]["ignored"] == lenient[0]
            assert seen["stream"] | {"text": "", "events": 0} == {"status": 200, "events": 0, "text": "", "rest": ""}
            assert len(seen["stream"]["text"]) == 8
            assert seen["stream"]["events"] > 1
            assert seen["upload"] == {"size": "5", "state": "ACTIVE", "deleted": 200}
            assert seen["error"] == {"status": 404, "told": "NOT_FOUND"}
            blocked = seen_by_the_page(stranger, server, tmp_path / "stranger")
            assert blocked == dict.fromkeys(seen, "TypeError: Failed to fetch")
