"""A server that answers each connection with bytes of the test's own, whatever it is asked, in a thread."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def raw_server(*answers: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """Its base URL, and the requests as they come; the last answer serves all later connections."""
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=_serve, args=(listening, answers, requests), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", requests
        finally:
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)  # ends accept()
    thread.join(timeout=30)


def json_answer(content: object, status: str = "200 OK") -> bytes:
    """A whole answer with a JSON body."""
    return whole(json.dumps(content).encode(), "application/json", status)


def whole(body: bytes, kind: str, status: str = "200 OK") -> bytes:
    """A whole answer."""
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def chunked(*pieces: bytes, complete: bool = True) -> bytes:
    """A stream of events in chunks; without its end where the server dies."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n" * complete


def _serve(listening: socket.socket, answers: Sequence[bytes], requests: list[bytes]) -> None:
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):
            connection.settimeout(30)
            requests.append(_request(connection))
            connection.sendall(answers[min(len(requests), len(answers)) - 1])
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)  # until the client has read it all: closing earlier may reset the connection


def _request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536) or b"\r\n\r\n"
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while len(body) < int(lengths[0] if lengths else 0):
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body
