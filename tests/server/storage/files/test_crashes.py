"""kill -9 at every single change of the disk: the old state or the new one is left, nothing between, and no rubbish.

Each operation is cut off at its first change, its second, and so on, until it gets through. (With a real server over
HTTP: tests/product/test_files_crash.py.)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from server.storage.files.store import FileStore
from server.storage.files.upload import NewFile, Uploads

START = "from server.storage.files.store import FileStore\nfrom server.storage.files.upload import NewFile, Uploads\n"


def run_until_dead(folder: Path, operation: str, step: int, code: str) -> bool:
    """Whether the operation got through."""
    program = f"{START}from pathlib import Path\nstore = FileStore(Path({str(folder)!r}))\n{code}"
    command = [sys.executable, "-m", "support.dying", operation, str(step), "-c", program]
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, timeout=60, capture_output=True, check=False
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
    return done.returncode == 0


def settle(store: FileStore) -> None:
    """What a server does when it starts; afterwards rows and blobs must be one to one."""
    store.sweep()
    known = store.catalog.blobs()
    assert set(os.listdir(store.blobs)) <= known.keys()
    assert {blob for blob, needed in known.items() if needed} <= set(os.listdir(store.blobs))
    assert store.sweep() == 0


def steps(folder: Path, operation: str):
    """A fresh folder for each step, until one gets through; at least two die."""
    for step in range(30):
        yield step, folder / f"{operation}{step}"
    pytest.fail("the operation never got through")


def test_a_chunk(tmp_path: Path) -> None:
    for step, folder in steps(tmp_path, "chunk"):
        store = FileStore(folder)
        uploads = Uploads(store)
        upload = uploads.start(NewFile("me", size=6))
        with uploads.writer(upload, 0) as writer:
            writer.write(b"ab")
        through = run_until_dead(
            folder, "chunk", step, f"w = Uploads(store).writer({upload!r}, 2)\nw.write(b'cd')\nw.close()"
        )
        received = uploads.status(upload).received
        assert received == 4 if through else received in (2, 4)
        settle(store)
        with uploads.writer(upload, received) as writer:
            writer.write(b"abcdef"[received:])
        with store.open(uploads.finish(upload)) as blob:
            assert blob.read() == b"abcdef"
        if through:
            assert step >= 3
            break


def test_the_first_chunk(tmp_path: Path) -> None:
    for step, folder in steps(tmp_path, "chunk"):
        store = FileStore(folder)
        upload = Uploads(store).start(NewFile("me", size=2))
        through = run_until_dead(
            folder, "chunk", step, f"w = Uploads(store).writer({upload!r}, 0)\nw.write(b'ab')\nw.close()"
        )
        settle(store)
        with Uploads(store).writer(upload, 0) as writer:
            writer.write(b"ab")
        assert Uploads(store).finish(upload).size == 2
        if through:
            assert step >= 3
            break


def test_finalize(tmp_path: Path) -> None:
    for step, folder in steps(tmp_path, "finalize"):
        store = FileStore(folder)
        uploads = Uploads(store)
        upload = uploads.start(NewFile("me", name="mine", size=2))
        with uploads.writer(upload, 0) as writer:
            writer.write(b"ab")
        through = run_until_dead(folder, "finalize", step, f"Uploads(store).finish({upload!r})")
        settle(store)
        assert not through or uploads.status(upload).file is not None
        assert uploads.finish(upload) == store.get("mine", "me")
        with store.open(store.get("mine", "me")) as blob:
            assert blob.read() == b"ab"
        if through:
            assert step >= 3
            break


@pytest.mark.parametrize("operation", ["delete", "cancel"])
def test_delete_and_cancel(tmp_path: Path, operation: str) -> None:
    for step, folder in steps(tmp_path, operation):
        store = FileStore(folder)
        uploads = Uploads(store)
        upload = uploads.start(NewFile("me", name="mine", size=2))
        with uploads.writer(upload, 0) as writer:
            writer.write(b"ab")
        if operation == "delete":
            uploads.finish(upload)
        code = "store.delete('mine', 'me')" if operation == "delete" else f"Uploads(store).cancel({upload!r})"
        through = run_until_dead(folder, operation, step, code)
        settle(store)
        left = store.catalog.blobs()
        assert len(left) == len(os.listdir(store.blobs)) <= 1
        assert not (through and left)
        if left and operation == "delete":
            with store.open(store.get("mine", "me")) as blob:
                assert blob.read() == b"ab"
        if through:
            assert step >= 2
            break


def test_sweep(tmp_path: Path) -> None:
    for step, folder in steps(tmp_path, "sweep"):
        store = FileStore(folder)
        uploads = Uploads(store)
        ids = {}
        for name in ("old", "older", "kept", "lost"):
            upload = uploads.start(NewFile("me", name=name, size=2))
            with uploads.writer(upload, 0) as writer:
                writer.write(b"ab")
            ids[name] = uploads.finish(upload)
        with store.catalog.changing() as db:
            db.execute("UPDATE files SET expires = 1 WHERE id IN ('old', 'older')")
        (store.blobs / "orphan").write_bytes(b"x")
        (store.blobs / ids["lost"].blob).unlink()
        through = run_until_dead(folder, "sweep", step, "store.sweep()")
        if not through:
            store.sweep()
        settle(store)
        assert os.listdir(store.blobs) == [ids["kept"].blob]
        assert [file.id for file in store.page("me", 10, "")[0]] == ["kept"]
        if through:
            assert step >= 4
            break


def test_start(tmp_path: Path) -> None:
    for step, folder in steps(tmp_path, "start"):
        store = FileStore(folder)
        through = run_until_dead(folder, "start", step, "Uploads(store).start(NewFile('me', name='mine', size=2))")
        settle(store)
        assert len(store.catalog.blobs()) == int(through)
        if through:
            assert step >= 1
            break
