"""A program that passes for a Gemini server: `python small_gemini.py PORT LOG LIMIT`.

Every answer has two tokens. It appends the body of each request to LOG as a line and refuses those after LIMIT.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

PORT, LOG, LIMIT = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
taken = 0
lock = Lock()


class Handler(BaseHTTPRequestHandler):
    """GET lists one model, POST streams."""

    def do_GET(self) -> None:
        self.answer(200, [json.dumps({"models": [{"name": "models/small"}]}).encode()])

    def do_POST(self) -> None:
        global taken
        body = self.rfile.read(int(self.headers["content-length"]))
        with lock, LOG.open("ab") as log:
            taken += 1
            log.write(body + b"\n")
            refused = taken > LIMIT
        if refused:
            self.answer(500, [b"worn out"])
        else:
            self.answer(200, [event("a", 1, None), event("b", 2, "STOP")])

    def answer(self, status: int, pieces: list[bytes]) -> None:
        self.send_response(status)
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece)
            self.wfile.flush()

    def log_message(self, *args: object) -> None:
        """Nothing is said."""


def event(text: str, tokens: int, finish: str | None) -> bytes:
    candidate = {"content": {"parts": [{"text": text}]}, "finishReason": finish}
    usage = {"promptTokenCount": 5, "candidatesTokenCount": tokens}
    return b"data: " + json.dumps({"candidates": [candidate], "usageMetadata": usage}).encode() + b"\n\n"


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
