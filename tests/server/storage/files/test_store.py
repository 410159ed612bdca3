"""The store of files: who sees what, what is swept, and what several processes make of one folder."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.errors import InvalidArgument, NotFound, PermissionDenied, as_api_error
from server.storage.files.store import FINISHED_SECONDS, FileLimits, FileStore, StoredFile
from server.storage.files.upload import NewFile, Uploads


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock):
    found = FileStore(tmp_path / "files", FileLimits(lifetime=3600, upload_lifetime=600), clock)
    yield found
    found.close()


def add(store: FileStore, data: bytes = b"data", owner: str = "me", name: str = "") -> StoredFile:
    uploads = Uploads(store)
    upload = uploads.start(NewFile(owner, name))
    with uploads.writer(upload, 0) as writer:
        writer.write(data)
    return uploads.finish(upload)


def blobs(store: FileStore) -> set[str]:
    return set(os.listdir(store.blobs))


def test_a_file_belongs_to_who_uploaded_it(store: FileStore) -> None:
    file = add(store, owner="me")
    for use in (store.get, store.delete):
        with pytest.raises(PermissionDenied) as foreign:
            use(file.id, "you")
        with pytest.raises(PermissionDenied) as missing:
            use("nothere", "you")
        assert foreign.value.message == missing.value.message.replace("nothere", file.id)
    assert store.get(file.id, "me") == file
    assert store.page("you", 10, "") == ([], "")


@pytest.mark.parametrize("file_id", ["", "nothere", "../../etc/passwd", "a" * 10_000, "A", "a\0", "files/x", "ä"])
def test_what_is_no_file_is_not_found(store: FileStore, file_id: str) -> None:
    for use in (store.get, store.delete):
        with pytest.raises(PermissionDenied, match="or it may not exist") as refusal:
            use(file_id, "me")
        assert len(refusal.value.message) < 300


def test_pages_show_every_file_once_newest_first(store: FileStore, clock: Clock) -> None:
    files = []
    for place in range(7):
        clock.now += place % 2  # some are of the same moment
        files.append(add(store))
    add(store, owner="you")
    seen, token = [], ""
    while True:
        page, token = store.page("me", 3, token)
        seen += page
        if not token:
            break
        add(store)  # what comes later does not shift the pages
    assert sorted(file.id for file in seen) == sorted(file.id for file in files)
    assert [file.created for file in seen] == sorted((file.created for file in files), reverse=True)


@pytest.mark.parametrize("token", ["x", "===", "MTIz", "ä", "bmFuIGFi", "x" * 10_000])
def test_a_token_of_somebody_else_is_refused(store: FileStore, token: str) -> None:
    with pytest.raises(InvalidArgument, match="page_token"):
        store.page("me", 3, token)


def test_a_deleted_file_is_gone_and_a_download_goes_on(store: FileStore) -> None:
    file = add(store)
    with store.open(file) as download:
        store.delete(file.id, "me")
        assert download.read() == b"data"
    assert blobs(store) == set()
    for use in (lambda: store.get(file.id, "me"), lambda: store.open(file), lambda: store.delete(file.id, "me")):
        with pytest.raises(PermissionDenied):
            use()


def test_an_expired_file_is_gone_before_it_is_swept(store: FileStore, clock: Clock) -> None:
    file = add(store, name="mine")
    clock.now = file.expires - 1
    assert store.sweep() == 0
    clock.now = file.expires
    with pytest.raises(PermissionDenied):
        store.get("mine", "me")
    assert store.page("me", 10, "") == ([], "")
    again = add(store, b"other", name="mine")
    assert store.sweep() == 1
    assert blobs(store) == {again.blob}


def test_an_upload_that_nobody_feeds_expires(store: FileStore, clock: Clock) -> None:
    uploads = Uploads(store)
    upload = uploads.start(NewFile("me"))
    clock.now += 500
    with uploads.writer(upload, 0) as writer:
        writer.write(b"a")
    clock.now += 500
    assert store.sweep() == 0
    assert uploads.status(upload).received == 1
    clock.now += 100
    with pytest.raises(NotFound):
        uploads.status(upload)
    assert store.sweep() == 1
    assert blobs(store) == set()


def test_a_complete_upload_answers_only_for_a_while(store: FileStore, clock: Clock) -> None:
    uploads = Uploads(store)
    upload = uploads.start(NewFile("me"))
    file = uploads.finish(upload)
    clock.now += FINISHED_SECONDS - 1
    store.sweep()
    assert uploads.status(upload).file == file
    clock.now += 1
    store.sweep()
    with pytest.raises(NotFound):
        uploads.status(upload)
    assert store.get(file.id, "me") == file


def test_the_sweep_removes_what_no_row_names_and_rows_that_lost_their_blob(store: FileStore) -> None:
    kept, lost, empty = add(store), add(store), add(store, b"")
    Uploads(store).start(NewFile("me", name="fresh"))  # no blob yet, and none is missing
    (store.blobs / "orphan").write_bytes(b"x")
    (store.blobs / lost.blob).unlink()
    assert store.sweep() == 2
    assert blobs(store) == {kept.blob, empty.blob}
    with pytest.raises(PermissionDenied):
        store.get(lost.id, "me")
    assert store.sweep() == 0


def test_processes_share_the_folder(store: FileStore, clock: Clock) -> None:
    other = FileStore(store.blobs.parent, store.limits, clock)
    file = add(store)
    assert other.get(file.id, "me") == file
    other.delete(file.id, "me")
    with pytest.raises(PermissionDenied):
        store.get(file.id, "me")
    other.close()


def test_processes_may_start_together_on_a_new_folder(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from server.storage.files.store import FileStore; "
        "sys.stdin.read(); FileStore(pathlib.Path('F'))"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    for number in range(3):
        program = code.replace("'F'", repr(str(tmp_path / str(number))))
        started = [
            subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": paths},
            )
            for _ in range(5)
        ]
        for process in started:
            process.stdin.close()
        assert [(process.wait(60), process.stderr.read()) for process in started] == [(0, b"")] * 5


@pytest.fixture
def open_umask() -> Iterator[None]:
    """New files are for everybody unless their maker says otherwise."""
    before = os.umask(0)
    yield
    os.umask(before)


def open_to_others(folder: Path) -> list[str]:
    """What in a folder, itself included, is more than its owner's."""
    return [path.name for path in (folder, *folder.rglob("*")) if path.stat().st_mode & 0o077]


@pytest.mark.usefixtures("open_umask")
def test_nobody_else_on_the_machine_reads_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    store = FileStore(folder)
    add(store)
    assert {path.name for path in folder.iterdir()} == {
        "blobs",
        "files.db",
        "files.db-shm",
        "files.db-wal",
        "files.lock",
    }
    assert open_to_others(folder) == []
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    # It is not closed: as after a crash, the log of the database is there.
    second = FileStore(folder)
    add(second)
    assert open_to_others(folder) == []
    second.close()
    store.close()


def test_a_folder_that_cannot_be_used_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "files.db").write_text("this is no database, and long enough to be read as one" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        FileStore(tmp_path / "files")


def test_a_file_that_the_disk_cannot_hold_is_refused_before_it_comes(tmp_path: Path) -> None:
    petabyte = 1024**5
    store = FileStore(tmp_path, FileLimits(2 * petabyte, 2 * petabyte, 2 * petabyte))
    with pytest.raises(OSError, match="No space left") as refused:
        Uploads(store).start(NewFile("me", size=petabyte))
    assert as_api_error(refused.value).status == "RESOURCE_EXHAUSTED"
    assert store.catalog.blobs() == {}
    store.close()
