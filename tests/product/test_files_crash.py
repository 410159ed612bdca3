"""kill -9 of the real server at each change that it makes to the disk: during a chunk, a finalize, a delete, a sweep.

Another server then starts on the same folder. Uploads go on from what `query` tells, files are as before or as after,
and once it has swept there is no blob without a row and no row without its blob.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from support.server import RunningServer, running_server

from server.storage.files.store import FileStore
from server.storage.files.upload import NewFile, Uploads

pytestmark = [pytest.mark.product, pytest.mark.timeout(900)]

DATA = random.Random(0).randbytes(3 * 1024 * 1024)
CUT = 1024 * 1024
START = {"X-Goog-Upload-Command": "start", "X-Goog-Upload-Protocol": "resumable"}
MANY = 20
SWEEP_SECONDS = 60.0
"""How long the sweep, which runs beside the server, may take."""


@pytest.fixture
def models(builtin_model: Path, tmp_path: Path) -> Path:
    """A models.yaml that loads nothing: files need no model."""
    path = tmp_path / "models.yaml"
    path.write_text(yaml.safe_dump({"models": {"idle": {"source": str(builtin_model), "load": "request"}}}))
    return path


@contextmanager
def dying_server(folder: Path, models: Path, operation: str, step: int) -> Iterator[RunningServer]:
    server = RunningServer(
        folder, "--models", str(models), program=("support.dying", operation, str(step), "server.cli")
    )
    try:
        yield server
    finally:
        status = server.stop()
        assert status in (0, -signal.SIGKILL), server.log()


def send(server: RunningServer, url: str, offset: int, data: bytes, command: str) -> httpx.Response:
    headers = {"X-Goog-Upload-Command": command, "X-Goog-Upload-Offset": str(offset)}
    return server.client.post(httpx.URL(url).raw_path.decode(), content=data, headers=headers)


def begun(server: RunningServer) -> str:
    """The address of an upload of which the first part has come."""
    answer = server.client.post("/upload/v1beta/files", json={"file": {"sizeBytes": len(DATA)}}, headers=START)
    url = answer.headers["X-Goog-Upload-URL"]
    assert send(server, url, 0, DATA[:CUT], "upload").status_code == 200
    return str(url)


def finished(server: RunningServer, url: str) -> str:
    """The name of the file, once the upload has gone on from what the server says that it has."""
    asked = send(server, url, 0, b"", "query")
    received = int(asked.headers["X-Goog-Upload-Size-Received"])
    assert received >= CUT
    answer = send(server, url, received, DATA[received:], "upload, finalize")
    assert answer.status_code == 200, answer.text
    file = answer.json()["file"]
    assert server.client.get(f"/v1beta/{file['name']}:download?alt=media").content == DATA
    return str(file["name"])


def assert_whole(folder: Path) -> None:
    store = FileStore(folder / "data" / "files")
    store.sweep()
    known = store.catalog.blobs()
    assert set(os.listdir(store.blobs)) == {blob for blob, needed in known.items() if needed}
    store.close()


def survives(call: Callable[..., httpx.Response], *args: object) -> bool:
    """Whether the server is still there to answer."""
    try:
        answer = call(*args)
    except httpx.TransportError:
        return False
    assert answer.status_code == 200, answer.text
    return True


@pytest.mark.parametrize("operation", ["chunk", "finalize"])
def test_an_upload_goes_on_after_kill_9(operation: str, models: Path, tmp_path: Path) -> None:
    for step in range(MANY):
        folder = tmp_path / str(step)
        folder.mkdir()
        with running_server(folder, "--models", str(models)) as server:
            url = begun(server)
            if operation == "finalize":
                assert send(server, url, CUT, DATA[CUT:], "upload").status_code == 200
        with dying_server(folder, models, operation, step) as server:
            server.wait_until_ready()
            sent = (CUT, DATA[CUT : 2 * CUT], "upload") if operation == "chunk" else (0, b"", "finalize")
            through = survives(send, server, url, *sent)
        with running_server(folder, "--models", str(models)) as server:
            name = finished(server, url)
            assert names(server) == [name]
        assert_whole(folder)
        if through:
            assert step >= 4
            return
    pytest.fail("it never got through")


def test_a_delete_is_done_or_not_after_kill_9(models: Path, tmp_path: Path) -> None:
    for step in range(MANY):
        folder = tmp_path / str(step)
        folder.mkdir()
        with dying_server(folder, models, "delete", step) as server:
            server.wait_until_ready()
            name = finished(server, begun(server))
            through = survives(server.client.delete, f"/v1beta/{name}")
        with running_server(folder, "--models", str(models)) as server:
            answer = server.client.get(f"/v1beta/{name}:download?alt=media")
            assert answer.status_code == 403 or (answer.content == DATA and not through)
        assert_whole(folder)
        if through:
            assert step >= 2
            return
    pytest.fail("it never got through")


def test_a_sweep_is_taken_up_again_after_kill_9(models: Path, tmp_path: Path) -> None:
    for step in range(MANY):
        folder = tmp_path / str(step)
        store = FileStore(folder / "data" / "files")
        uploads = Uploads(store)
        files = {}
        for name in ("old", "older", "kept", "lost"):
            upload = uploads.start(NewFile("", name))
            with uploads.writer(upload, 0) as writer:
                writer.write(b"data")
            files[name] = uploads.finish(upload)
        with store.catalog.changing() as db:
            db.execute("UPDATE files SET expires = 1 WHERE id IN ('old', 'older')")
        (store.blobs / "orphan").write_bytes(b"x")
        (store.blobs / files["lost"].blob).unlink()
        store.close()
        with dying_server(folder, models, "sweep", step) as server:
            through = survives_start(server)
        with running_server(folder, "--models", str(models)) as server:
            deadline = time.monotonic() + SWEEP_SECONDS
            while len(names(server)) > 1 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert names(server) == ["files/kept"]
        assert os.listdir(folder / "data" / "files" / "blobs") == [files["kept"].blob]
        assert_whole(folder)
        if through:
            assert step >= 4
            return
    pytest.fail("it never got through")


def names(server: RunningServer) -> list[str]:
    return [file["name"] for file in server.client.get("/v1beta/files").json().get("files", [])]


def survives_start(server: RunningServer) -> bool:
    """Whether the server is still there when the sweep, which runs beside its start, has made its last change.

    It may die before it is ready or, having told that it is, before its first request.
    """
    orphan = server.log_path.parent / "data" / "files" / "blobs" / "orphan"
    deadline = time.monotonic() + SWEEP_SECONDS
    try:
        server.wait_until_ready()
        while len(names(server)) > 1 or orphan.exists():
            assert time.monotonic() < deadline, f"the sweep did not end:\n{server.log()}"
            time.sleep(0.02)
    except (RuntimeError, httpx.TransportError):
        return False
    return True


def test_two_servers_share_a_folder(models: Path, tmp_path: Path) -> None:
    with (
        running_server(tmp_path, "--models", str(models)) as one,
        running_server(tmp_path, "--models", str(models)) as other,
    ):
        url = begun(one)
        assert send(other, url, CUT, DATA[CUT : 2 * CUT], "upload").status_code == 200
        name = finished(one, url)
        assert other.client.get(f"/v1beta/{name}:download?alt=media").content == DATA
        assert other.client.delete(f"/v1beta/{name}").status_code == 200
        assert one.client.get(f"/v1beta/{name}").status_code == 403
    assert_whole(tmp_path)
