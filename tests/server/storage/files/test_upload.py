"""Uploads against a model of them, and everything that a client can do wrong."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.examples import examples

from server.errors import (
    Aborted,
    AlreadyExists,
    InvalidArgument,
    NotFound,
    PayloadTooLarge,
    PermissionDenied,
    ResourceExhausted,
)
from server.storage.files import upload as upload_module
from server.storage.files.store import FileLimits, FileStore
from server.storage.files.upload import NewFile, Uploads


@pytest.fixture
def store(tmp_path: Path):
    found = FileStore(tmp_path / "files", FileLimits(file_bytes=100, owner_bytes=150, total_bytes=200, owner_files=4))
    yield found
    found.close()


@pytest.fixture
def uploads(store: FileStore) -> Uploads:
    return Uploads(store)


def sent(uploads: Uploads, data: bytes, owner: str = "me", **said: object):
    upload = uploads.start(NewFile(owner, size=len(data), **said))
    with uploads.writer(upload, 0) as writer:
        writer.write(data)
    return uploads.finish(upload)


def test_a_file_is_what_was_sent_and_what_was_said(store: FileStore, uploads: Uploads) -> None:
    file = sent(uploads, b"hello", display_name="greeting", mime_type="text/plain")
    assert store.get(file.id, "me") == file
    with store.open(file) as blob:
        assert blob.read() == b"hello"
    assert (file.size, file.sha256) == (5, hashlib.sha256(b"hello").digest())
    assert (file.display_name, file.mime_type, file.owner) == ("greeting", "text/plain", "me")
    assert file.expires - file.updated == store.limits.lifetime


def test_an_empty_file_needs_no_bytes(store: FileStore, uploads: Uploads) -> None:
    file = uploads.finish(uploads.start(NewFile("me", size=0)))
    with store.open(file) as blob:
        assert blob.read() == b""
    assert file.sha256 == hashlib.sha256(b"").digest()


def test_an_upload_is_no_file_until_it_is_finished(store: FileStore, uploads: Uploads) -> None:
    upload = uploads.start(NewFile("me", name="files/mine", size=5))
    with uploads.writer(upload, 0) as writer:
        writer.write(b"hello")
    with pytest.raises(PermissionDenied):
        store.get("mine", "me")
    assert store.page("me", 10, "") == ([], "")
    uploads.finish(upload)
    assert store.get("mine", "me").size == 5


def test_ids_cannot_be_guessed_and_are_plain(uploads: Uploads) -> None:
    ids = {sent(uploads, b"", owner=str(place)).id for place in range(20)}
    assert len(ids) == 20
    assert all(len(file_id) == 24 and file_id.isalnum() and file_id.islower() for file_id in ids)


@pytest.mark.parametrize("name", ["files/UPPER", "a/b", "../x", "a" * 41, "files/", "ä", "files/files/a", "-a", "a-"])
def test_a_name_of_other_letters_is_refused(uploads: Uploads, name: str) -> None:
    if name == "files/":
        assert len(sent(uploads, b"x", name=name).id) == 24
        return
    with pytest.raises(InvalidArgument, match="lowercase letters, digits and dashes"):
        uploads.start(NewFile("me", name=name))


def test_a_name_is_taken_from_the_start_of_its_upload(uploads: Uploads, store: FileStore) -> None:
    upload = uploads.start(NewFile("me", name="mine"))
    with pytest.raises(AlreadyExists, match="'mine'"):
        uploads.start(NewFile("you", name="files/mine"))
    uploads.cancel(upload)
    file = sent(uploads, b"x", name="mine")
    with pytest.raises(AlreadyExists):
        uploads.start(NewFile("me", name="mine"))
    store.delete(file.id, "me")
    lost = uploads.start(NewFile("me", name="mine"))
    store.delete("mine", "me")
    with pytest.raises(NotFound):
        uploads.status(lost)
    assert sent(uploads, b"y", name="mine").size == 1


def test_a_chunk_that_comes_twice_is_harmless_at_every_point(store: FileStore, uploads: Uploads) -> None:
    upload = uploads.start(NewFile("me", size=6))
    for offset, data in ((0, b"ab"), (0, b"ab"), (0, b"abcd"), (2, b"cd"), (1, b"bc"), (3, b"def")):
        with uploads.writer(upload, offset) as writer:
            writer.write(data)
    file = uploads.finish(upload)
    with uploads.writer(upload, 3) as writer:
        writer.write(b"def")
    assert uploads.finish(upload) == file
    assert uploads.status(upload).file == file
    with store.open(file) as blob:
        assert blob.read() == b"abcdef"


def test_other_bytes_than_before_are_refused(store: FileStore, uploads: Uploads) -> None:
    upload = uploads.start(NewFile("me", size=4))
    with uploads.writer(upload, 0) as writer:
        writer.write(b"abcd")
    with pytest.raises(InvalidArgument, match="differ"), uploads.writer(upload, 1) as writer:
        writer.write(b"xx")
    file = uploads.finish(upload)
    with pytest.raises(InvalidArgument, match="differ"), uploads.writer(upload, 0) as writer:
        writer.write(b"x")
    with pytest.raises(InvalidArgument, match="has 4 bytes"), uploads.writer(upload, 4) as writer:
        writer.write(b"e")
    with store.open(file) as blob:
        assert blob.read() == b"abcd"


def test_an_offset_that_leaves_a_hole_is_refused(uploads: Uploads) -> None:
    upload = uploads.start(NewFile("me"))
    for offset in (1, -1, 10**30):
        with pytest.raises(InvalidArgument, match=f"offset {offset} is wrong: 0 bytes"):
            uploads.writer(upload, offset)


def test_fewer_and_more_bytes_than_declared_are_refused(uploads: Uploads) -> None:
    upload = uploads.start(NewFile("me", size=4))
    with uploads.writer(upload, 0) as writer:
        writer.write(b"abc")
    with pytest.raises(InvalidArgument, match="declared 4 bytes, but 3 were received"):
        uploads.finish(upload)
    with pytest.raises(InvalidArgument, match="has 4 bytes, but bytes up to 5"), uploads.writer(upload, 3) as writer:
        writer.write(b"de")
    with uploads.writer(upload, 3) as writer:
        writer.write(b"d")
    assert uploads.finish(upload).size == 4


def test_there_is_one_writer_at_a_time(uploads: Uploads, store: FileStore) -> None:
    upload = uploads.start(NewFile("me"))
    others = Uploads(FileStore(store.blobs.parent, store.limits))
    with uploads.writer(upload, 0) as writer:
        writer.write(b"a")
        for busy in (uploads, others):
            with pytest.raises(Aborted):
                busy.writer(upload, 0)
            with pytest.raises(Aborted):
                busy.finish(upload)
    with others.writer(upload, 1) as writer:
        writer.write(b"b")
    assert uploads.finish(upload).size == 2


def test_what_was_written_before_a_failure_is_kept(uploads: Uploads) -> None:
    upload = uploads.start(NewFile("me", size=3))
    with uploads.writer(upload, 0) as writer:
        writer.write(b"abc")
        with pytest.raises(InvalidArgument):
            writer.write(b"d")
    assert uploads.status(upload).received == 3


def test_bytes_are_safe_every_few_megabytes(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_module, "KEPT_EVERY", 4)
    upload = uploads.start(NewFile("me"))
    with uploads.writer(upload, 0) as writer:
        writer.write(b"abc")
        assert uploads.status(upload).received == 0
        writer.write(b"de")
        assert uploads.status(upload).received == 5


def test_what_a_dead_process_wrote_but_did_not_keep_is_no_part_of_the_file(store: FileStore, uploads: Uploads) -> None:
    upload = uploads.start(NewFile("me"))
    with uploads.writer(upload, 0) as writer:
        writer.write(b"abc")
    (blob,) = store.blobs.iterdir()
    blob.write_bytes(b"abcGARBAGE")
    with uploads.writer(upload, 3) as writer:
        writer.write(b"d")
    with store.open(uploads.finish(upload)) as file:
        assert file.read() == b"abcd"


def test_an_upload_whose_bytes_are_lost_is_over(store: FileStore, uploads: Uploads) -> None:
    upload = uploads.start(NewFile("me"))
    with uploads.writer(upload, 0) as writer:
        writer.write(b"abc")
    (blob,) = store.blobs.iterdir()
    blob.write_bytes(b"ab")
    with pytest.raises(NotFound, match="lost"):
        uploads.finish(upload)
    assert list(store.blobs.iterdir()) == []
    with pytest.raises(NotFound):
        uploads.status(upload)


def test_a_cancelled_upload_leaves_nothing(store: FileStore, uploads: Uploads) -> None:
    upload = uploads.start(NewFile("me", size=100))
    with uploads.writer(upload, 0) as writer:
        writer.write(b"abc")
    uploads.cancel(upload)
    assert list(store.blobs.iterdir()) == []
    for use in (uploads.status, uploads.finish, uploads.cancel, lambda it: uploads.writer(it, 0)):
        with pytest.raises(NotFound):
            use(upload)
    assert sent(uploads, b"x" * 100).size == 100


def test_a_writer_notices_that_its_upload_was_cancelled(store: FileStore, uploads: Uploads) -> None:
    upload = uploads.start(NewFile("me"))
    writer = uploads.writer(upload, 0)
    writer.write(b"abc")
    uploads.cancel(upload)
    with pytest.raises(NotFound):
        writer.close()
    assert list(store.blobs.iterdir()) == []


def test_a_complete_upload_cannot_be_cancelled(store: FileStore, uploads: Uploads) -> None:
    upload = uploads.start(NewFile("me"))
    file = uploads.finish(upload)
    with pytest.raises(InvalidArgument, match=f"delete 'files/{file.id}'"):
        uploads.cancel(upload)
    assert store.get(file.id, "me") == file


def test_an_upload_ends_with_its_file(store: FileStore, uploads: Uploads) -> None:
    upload = uploads.start(NewFile("me"))
    store.delete(uploads.finish(upload).id, "me")
    with pytest.raises(NotFound):
        uploads.status(upload)


def test_quotas_hold_to_the_byte(uploads: Uploads) -> None:
    with pytest.raises(PayloadTooLarge, match="101 bytes or more; at most 100"):
        uploads.start(NewFile("me", size=101))
    sent(uploads, b"x" * 100)
    with pytest.raises(ResourceExhausted, match=r"your files hold 100 bytes, and 51 more .* limit of 150"):
        uploads.start(NewFile("me", size=51))
    sent(uploads, b"x" * 50)
    with pytest.raises(ResourceExhausted, match=r"all files hold 150 bytes, and 51 more .* limit of 200"):
        uploads.start(NewFile("you", size=51))
    assert sent(uploads, b"x" * 50, owner="you").size == 50


def test_what_is_declared_counts_before_it_comes(uploads: Uploads) -> None:
    first = uploads.start(NewFile("me", size=100))
    with pytest.raises(ResourceExhausted):
        uploads.start(NewFile("me", size=51))
    uploads.cancel(first)
    uploads.start(NewFile("me", size=51))


def test_a_size_that_is_not_declared_counts_as_it_grows(uploads: Uploads) -> None:
    sent(uploads, b"x" * 100)
    upload = uploads.start(NewFile("me"))
    with uploads.writer(upload, 0) as writer:
        writer.write(b"x" * 50)
        with pytest.raises(ResourceExhausted, match="limit of 150"):
            writer.write(b"x")
    assert uploads.finish(upload).size == 50
    fresh = uploads.start(NewFile("you"))
    with uploads.writer(fresh, 0) as writer, pytest.raises(ResourceExhausted, match="limit of 200"):
        writer.write(b"x" * 51)


def test_the_number_of_files_is_limited(uploads: Uploads) -> None:
    for _ in range(4):
        uploads.start(NewFile("me", size=0))
    with pytest.raises(ResourceExhausted, match=r"you have 4 files, and 1 more .* limit of 4"):
        uploads.start(NewFile("me", size=0))
    uploads.start(NewFile("you", size=0))


def test_what_a_crash_leaves_of_a_whole_file_goes_soon(store: FileStore, uploads: Uploads) -> None:
    now = store.clock()
    store.clock = lambda: now
    uploads.start(NewFile("me", size=100, whole=True))
    kept = uploads.start(NewFile("you", size=100))
    now += upload_module.WHOLE_SECONDS
    assert store.sweep() == 1
    assert sent(uploads, b"x" * 100).size == 100
    assert uploads.status(kept).received == 0


def test_a_slow_request_is_made_safe_by_the_clock(store: FileStore, uploads: Uploads) -> None:
    now = store.clock()
    store.clock = lambda: now
    upload = uploads.start(NewFile("me", whole=True))
    with uploads.writer(upload, 0) as writer:
        for _ in range(20):
            now += upload_module.KEPT_SECONDS
            writer.write(b"x")
        assert uploads.status(upload).received == 20


def test_a_failing_catalog_does_not_leave_an_upload_locked(
    store: FileStore, uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = uploads.start(NewFile("me"))
    lookup, calls = store.catalog.upload, []

    def failing(upload_id: str, now: float):
        calls.append(upload_id)
        if len(calls) == 2:
            raise sqlite3.OperationalError("database is locked")
        return lookup(upload_id, now)

    monkeypatch.setattr(store.catalog, "upload", failing)
    with pytest.raises(sqlite3.OperationalError):
        uploads.writer(upload, 0)
    with uploads.writer(upload, 0) as writer:
        writer.write(b"x")


def test_a_long_display_name_is_refused(uploads: Uploads) -> None:
    uploads.start(NewFile("me", display_name="é" * 512))
    with pytest.raises(InvalidArgument, match="513 characters, but at most 512"):
        uploads.start(NewFile("me", display_name="x" * 513))


class UploadMachine(RuleBasedStateMachine):
    """One upload, sent in random pieces by clients that repeat, overlap, reopen and restart the server."""

    @initialize(data=st.binary(max_size=60), declared=st.booleans())
    def begin(self, data: bytes, declared: bool) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.data = data
        self.received = 0
        self.file = None
        self.open()
        self.upload = self.uploads.start(NewFile("me", size=len(data) if declared else None))

    def open(self) -> None:
        self.store = FileStore(self.folder)
        self.uploads = Uploads(self.store)

    @rule(offset=st.integers(0, 70), length=st.integers(0, 30), cut=st.integers(1, 9))
    def send(self, offset: int, length: int, cut: int) -> None:
        piece = self.data[offset : offset + length]
        if offset > self.received:
            with pytest.raises(InvalidArgument):
                self.uploads.writer(self.upload, offset)
            return
        with self.uploads.writer(self.upload, offset) as writer:
            for start in range(0, len(piece), cut):
                writer.write(piece[start : start + cut])
        self.received = max(self.received, offset + len(piece)) if piece else self.received

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.open()
        self.store.sweep()

    @precondition(lambda self: self.received == len(self.data))
    @rule()
    def finish(self) -> None:
        file = self.uploads.finish(self.upload)
        assert self.file in (None, file)
        self.file = file

    @invariant()
    def everything_is_told_as_it_is(self) -> None:
        if not hasattr(self, "upload"):
            return
        status = self.uploads.status(self.upload)
        assert (status.received, status.file) == (self.received, self.file)
        if self.file:
            with self.store.open(self.file) as blob:
                assert blob.read() == self.data

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)


UploadMachine.TestCase.settings = settings(max_examples=examples(40), stateful_step_count=15)
TestUploads = UploadMachine.TestCase
