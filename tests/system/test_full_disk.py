"""A disk that uploads fill: the client is told, the server goes on, and what is deleted gives its room back."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.server import RunningServer, running_server

from server.storage.files.store import KEPT_FREE

pytestmark = pytest.mark.system

MIB = 1024 * 1024
ROOM = 8 * MIB
URL = "/upload/v1beta/files"
START = {"X-Goog-Upload-Command": "start", "X-Goog-Upload-Protocol": "resumable"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The server's data folder, on a file system of its own with room for 8 MiB of files."""
    folder = tmp_path_factory.mktemp("full") / "data"
    folder.mkdir()
    size = f"size={ROOM + KEPT_FREE + MIB}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "castor-test", str(folder)], check=True, timeout=60)
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=60)


@pytest.fixture(scope="module")
def server(builtin_model: Path, data: Path) -> Iterator[RunningServer]:
    with running_server(data.parent) as started:
        yield started


@pytest.fixture(autouse=True)
def empty_afterwards(server: RunningServer) -> Iterator[None]:
    yield
    for file in server.client.get("/v1beta/files").json().get("files", []):
        assert server.client.delete(f"/v1beta/{file['name']}").status_code == 200


def sent(server: RunningServer, size: int) -> httpx.Response:
    return server.client.post(URL, content=b"x" * size, headers={"X-Goog-Upload-Protocol": "raw"})


def expect_full(answer: httpx.Response) -> None:
    assert answer.status_code == 429, answer.text
    assert answer.json()["error"]["status"] == "RESOURCE_EXHAUSTED"
    assert "disk" in answer.json()["error"]["message"]


def free(data: Path) -> int:
    disk = os.statvfs(data)
    return disk.f_bavail * disk.f_frsize


def test_uploads_fill_the_disk_and_deleting_gives_it_back(server: RunningServer, data: Path) -> None:
    kept = sent(server, 5 * MIB).json()["file"]
    for _ in range(3):
        expect_full(sent(server, 6 * MIB))
    assert free(data) > KEPT_FREE + 2 * MIB, "what was refused has gone"
    assert server.client.get(f"/v1beta/{kept['name']}").json()["sizeBytes"] == str(5 * MIB)
    question = {"contents": [{"parts": [{"text": "Hello"}]}], "generationConfig": {"maxOutputTokens": 2}}
    assert server.generate(question).status_code == 200
    assert server.client.delete(f"/v1beta/{kept['name']}").status_code == 200
    assert sent(server, 6 * MIB).status_code == 200


def test_an_upload_in_pieces_goes_on_when_there_is_room_again(server: RunningServer) -> None:
    other = sent(server, 4 * MIB).json()["file"]
    declared = server.client.post(URL, json={}, headers={**START, "X-Goog-Upload-Header-Content-Length": str(64 * MIB)})
    expect_full(declared)
    begun = server.client.post(URL, json={}, headers=START)
    address = httpx.URL(begun.headers["X-Goog-Upload-URL"]).raw_path.decode()
    data = bytes(range(256)) * (6 * MIB // 256)
    last = {"X-Goog-Upload-Command": "upload, finalize", "X-Goog-Upload-Offset": "0"}
    expect_full(server.client.post(address, content=data, headers=last))
    asked = server.client.post(address, headers={"X-Goog-Upload-Command": "query"})
    offset = int(asked.headers["X-Goog-Upload-Size-Received"])
    assert 0 < offset < len(data)
    assert server.client.delete(f"/v1beta/{other['name']}").status_code == 200
    rest = server.client.post(address, content=data[offset:], headers={**last, "X-Goog-Upload-Offset": str(offset)})
    assert rest.json()["file"]["sizeBytes"] == str(len(data))


def test_a_disk_that_others_fill(server: RunningServer, data: Path) -> None:
    kept = sent(server, MIB).json()["file"]
    with pytest.raises(OSError, match="No space left"):
        (data / "others").write_bytes(b"x" * (ROOM + KEPT_FREE + MIB))
    assert free(data) == 0
    expect_full(sent(server, 1))
    assert server.client.get("/v1beta/files").json()["files"] == [kept]
    os.unlink(data / "others")
    assert server.client.delete(f"/v1beta/{kept['name']}").status_code == 200
    assert sent(server, MIB).status_code == 200
