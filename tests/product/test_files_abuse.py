"""What strangers do to the Files API of a real server: a clear 4xx each, and the server goes on, in the same memory."""

from __future__ import annotations

import base64
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from support.pdfs import bomb
from support.server import RunningServer, running_server
from support.waiting import comes_true

pytestmark = pytest.mark.product

MIB = 1024 * 1024
RAW = {"X-Goog-Upload-Protocol": "raw"}
START = {"X-Goog-Upload-Command": "start", "X-Goog-Upload-Protocol": "resumable"}
QUOTA = 120 * MIB


@pytest.fixture(scope="module")
def server(builtin_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("abuse")
    models = folder / "models.yaml"
    models.write_text(yaml.safe_dump({"models": {"idle": {"source": str(builtin_model), "load": "request"}}}))
    limits = {
        "CASTOR_BODY_STALL_SECONDS": "3",
        "CASTOR_MAX_FILE_BYTES": str(60 * MIB),
        "CASTOR_MAX_KEY_FILE_BYTES": str(QUOTA),
    }
    with running_server(folder, "--models", str(models), environment=limits) as started:
        yield started


@pytest.fixture(autouse=True)
def healthy_and_empty_afterwards(server: RunningServer) -> Iterator[None]:
    yield
    assert server.client.get("/healthz").status_code == 200
    for file in server.client.get("/v1beta/files?pageSize=100").json().get("files", []):
        assert server.client.delete(f"/v1beta/{file['name']}").status_code == 200


def started(server: RunningServer, **said: object) -> str:
    answer = server.client.post("/upload/v1beta/files", json={"file": said}, headers=START)
    return httpx.URL(answer.headers["X-Goog-Upload-URL"]).raw_path.decode()


def spoken(server: RunningServer, request: bytes, *, end_after: float | None = None) -> bytes:
    """Everything that the server answers to bytes on a bare connection, whose end we may send after some seconds."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request)
        if end_after is not None:
            time.sleep(end_after)
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
            if b"\r\n\r\n" in answer and end_after is None:
                break
    return answer


def head(method: str, path: str, **headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1"]
    return "\r\n".join([*lines, *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items()), "", ""]).encode()


@pytest.mark.parametrize(
    "path",
    [
        "/v1beta/files/../../../../etc/passwd",
        "/v1beta/files/..%2f..%2f..%2fetc%2fpasswd:download?alt=media",
        "/v1beta/files/%00",
        "/v1beta/files/" + "a" * 10_000,
        "/v1beta/files/files.db:download",
        "/upload/v1beta/files/../../../etc/passwd",
    ],
)
def test_ids_that_look_like_paths(server: RunningServer, path: str) -> None:
    answer = spoken(server, head("GET", path))
    assert answer.startswith((b"HTTP/1.1 403 ", b"HTTP/1.1 404 ")), answer[:200]
    assert b"root:" not in answer
    assert len(answer) < 2000


def test_a_length_that_lies_keeps_what_came(server: RunningServer) -> None:
    url = started(server)
    request = head("POST", url, x_goog_upload_command="upload", x_goog_upload_offset="0", content_length="100")

    def received() -> str:
        asked = server.client.post(url, headers={"X-Goog-Upload-Command": "query"})
        return asked.headers["X-Goog-Upload-Size-Received"]

    def is_kept(pause: float) -> bool:
        spoken(server, request + b"x" * 40, end_after=pause)
        return comes_true(lambda: received() == "40", 5)

    # The HTTP library drops what a busy server finds together with the end of its connection: then once more, slower.
    assert any(map(is_kept, (0.3, 1.0, 2.0))), received()
    last = {"X-Goog-Upload-Command": "upload, finalize", "X-Goog-Upload-Offset": "40"}
    assert server.client.post(url, content=b"y", headers=last).json()["file"]["sizeBytes"] == "41"


def test_declared_sizes_that_lie(server: RunningServer) -> None:
    url = started(server, sizeBytes=10)
    whole = {"X-Goog-Upload-Command": "upload, finalize", "X-Goog-Upload-Offset": "0"}
    for data, words in ((b"x" * 9, "declared 10 bytes, but 9"), (b"x" * 11, "has 10 bytes, but bytes up to 11")):
        answer = server.client.post(url, content=data, headers=whole)
        assert (answer.status_code, words in answer.json()["error"]["message"]) == (400, True), answer.text
    assert server.client.post(url, headers={"X-Goog-Upload-Command": "cancel"}).status_code == 200


def test_a_body_that_stalls(server: RunningServer) -> None:
    url = started(server)
    request = head("POST", url, x_goog_upload_command="upload", x_goog_upload_offset="0", content_length="100")
    answer = spoken(server, request + b"x" * 10)
    assert answer.startswith(b"HTTP/1.1 408 "), answer
    assert server.client.post(url, headers={"X-Goog-Upload-Command": "cancel"}).status_code == 200
    form = head("POST", "/upload/v1beta/files", content_type="multipart/form-data; boundary=b", content_length="1000")
    answer = spoken(server, form + b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nand then nothing')
    assert answer.startswith(b"HTTP/1.1 408 "), answer
    generate = head("POST", "/v1beta/models/idle:generateContent", content_length="1000")
    assert spoken(server, generate + b"{").startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 503 "))
    assert server.client.get("/v1beta/files").json() == {}


def test_a_boundary_that_never_comes(server: RunningServer) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    part = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
    for body in (part + random.Random(0).randbytes(30 * MIB), b"x" * (5 * MIB), part[:-2] + b"A: " + b"b" * MIB):
        answer = server.client.post("/upload/v1beta/files", content=body, headers=kind)
        assert answer.status_code == 400, answer.text
        assert "multipart body" in answer.json()["error"]["message"]
    nameless = b"--b\r\nContent-Type: text/plain\r\n\r\nx\r\n--b--\r\n"
    answer = server.client.post("/upload/v1beta/files", content=nameless, headers=kind)
    assert (answer.status_code, "has no name" in answer.json()["error"]["message"]) == (400, True)
    assert server.client.get("/v1beta/files").json() == {}


def test_two_writers_on_one_upload(server: RunningServer) -> None:
    url = started(server)
    begun, answered, answers = threading.Event(), threading.Event(), []

    def pieces() -> Iterator[bytes]:
        yield b"a" * (16 * MIB)  # more than the system holds for a server that does not read
        begun.set()
        answered.wait(30)
        yield b"b" * MIB

    headers = {"X-Goog-Upload-Command": "upload, finalize", "X-Goog-Upload-Offset": "0"}
    first = threading.Thread(
        target=lambda: answers.append(httpx.post(server.url + url, content=pieces(), headers=headers, timeout=30))
    )
    first.start()
    assert begun.wait(30)
    second = server.client.post(url, content=b"c", headers=headers)
    answered.set()
    first.join(30)
    assert (second.status_code, second.json()["error"]["status"]) == (409, "ABORTED")
    assert answers[0].json()["file"]["sizeBytes"] == str(17 * MIB)


def test_the_quota_to_the_byte(server: RunningServer) -> None:
    def kept(size: int) -> httpx.Response:
        return server.client.post("/upload/v1beta/files", content=b"\0" * size, headers=RAW)

    over = kept(60 * MIB + 1)
    assert over.status_code == 413
    assert str(60 * MIB) in over.json()["error"]["message"]
    assert [kept(60 * MIB).status_code, kept(60 * MIB).status_code] == [200, 200]
    full = kept(1)
    assert full.status_code == 429
    assert f"hold {QUOTA} bytes, and 1 more would be over the limit of {QUOTA}" in full.json()["error"]["message"]
    assert kept(0).status_code == 200


def test_memory_is_flat_over_many_large_uploads(server: RunningServer) -> None:
    data = random.Random(0).randbytes(50 * MIB)
    form = {"metadata": (None, '{"file": {"displayName": "large"}}'), "file": ("large.bin", data)}
    resident = []
    for number in range(20):
        if number % 2:
            answer = server.client.post("/upload/v1beta/files", content=data, headers=RAW)
        else:
            answer = server.client.post("/upload/v1beta/files", files=form)
        name = answer.json()["file"]["name"]
        assert server.client.get(f"/v1beta/{name}:download?alt=media").content == data
        assert server.client.delete(f"/v1beta/{name}").status_code == 200
        resident.append(server.resident_bytes())
    assert max(resident[2:]) - max(resident[:2]) < 25 * MIB, [r // MIB for r in resident]
    assert max(resident) < 400 * MIB


def test_a_pdf_that_is_a_bomb(castor: RunningServer) -> None:
    before = castor.resident_bytes()
    part = {"inlineData": {"mimeType": "application/pdf", "data": base64.b64encode(bomb(3000)).decode()}}
    answer = castor.generate({"contents": [{"parts": [part, {"text": "What does it say?"}]}]})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"].startswith("contents[0].parts[0].inline_data: ")
    assert castor.resident_bytes() - before < 50 * MIB
    assert json.loads(castor.generate({"contents": "Hi", "generationConfig": {"maxOutputTokens": 1}}).text)[
        "candidates"
    ]
