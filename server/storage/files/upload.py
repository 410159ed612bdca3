"""Uploads: bytes that enter the store in pieces, which may be repeated, resumed and interrupted at any moment.

The catalog says how many bytes of an upload are safely in its blob. Bytes beyond them were being written when a process
died, and are written again. A lock on the blob keeps a second writer out, even one in another process.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import string
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType

from server.errors import Aborted, AlreadyExists, InvalidArgument, NotFound, PayloadTooLarge, ResourceExhausted
from server.storage.files.catalog import Row, StorageUsage, hold, insert, usage
from server.storage.files.store import ID, FileLimits, FileStore, StoredFile, stored

KEPT_EVERY = 8 * 1024**2
"""Bytes of one request after which what has arrived is synced to disk: a crash costs a client no more than this."""
KEPT_SECONDS = 60.0
"""The same for slow requests."""
WHOLE_SECONDS = 600.0
"""How long the upload of a file that comes in one request outlives its last byte."""
MAX_DISPLAY_NAME = 512
_ALPHABET = string.ascii_lowercase + string.digits
_ID_LENGTH = 24
_NO_UPLOAD = "This upload does not exist: it was cancelled, has expired, or is long complete. Start a new one."


@dataclass(frozen=True, slots=True)
class NewFile:
    """What a client declares of a file before it sends it. ``name`` is the client's choice, with or without ``files/``;
    ``size`` in bytes, None if not declared. ``whole``: it comes in one request and cannot be resumed, so what a crash
    leaves of it is removed soon."""

    owner: str
    name: str = ""
    display_name: str = ""
    mime_type: str = ""
    size: int | None = None
    whole: bool = False


@dataclass(frozen=True, slots=True)
class UploadStatus:
    """How many bytes of an upload are safe, and its ``file`` once it is complete."""

    received: int
    file: StoredFile | None = None


class Uploads:
    """The uploads of a store, by ids that are secrets. Methods block: call them in a thread."""

    def __init__(self, store: FileStore) -> None:
        self._store = store

    def start(self, new: NewFile) -> str:
        """Reserve the name and the room for a file; returns the id of its upload.

        Raises ``InvalidArgument``, ``AlreadyExists`` for a name that is taken, ``PayloadTooLarge`` and
        ``ResourceExhausted`` where a file of this size is over a limit, ``OSError`` where the disk has no room for it.
        """
        row = self._new_row(new)
        with self._store.catalog.changing() as db:
            _check_room(self._store.limits, usage(db, row.owner, row.created), row.held, files=1)
            self._store.need_disk(row.held)
            if not insert(db, row):
                # Ids are one namespace, since a uri tells no owner; so a name that another key has cannot be given.
                raise AlreadyExists(
                    f"File {row.id!r} already exists: choose another name, or delete it if it is yours."
                )
        assert row.upload is not None
        return row.upload

    def status(self, upload_id: str) -> UploadStatus:
        """Raises ``NotFound``."""
        row = self._row(upload_id)
        return UploadStatus(row.received, stored(row))

    def writer(self, upload_id: str, offset: int) -> Writer:
        """A writer of the bytes from ``offset`` on, open until it is closed.

        Raises ``NotFound``, ``Aborted`` while another writer is open, and ``InvalidArgument`` for an offset beyond the
        bytes received.
        """
        row, descriptor = self._locked(upload_id)
        if 0 <= offset <= row.received:
            return Writer(self._store, row, descriptor, offset)
        os.close(descriptor)
        raise InvalidArgument(
            f"The offset {offset} is wrong: {row.received} bytes of this upload were received. "
            "Ask with the command query, and continue from there."
        )

    def finish(self, upload_id: str) -> StoredFile:
        """Make the file visible, all at once; for an upload that is complete already it only returns the file.

        Raises ``InvalidArgument`` where bytes are missing, ``NotFound``, and ``Aborted`` while a writer is open.
        """
        row, descriptor = self._locked(upload_id)
        try:
            if row.sha256 is None:
                if row.size not in (None, row.received):
                    raise InvalidArgument(
                        f"The upload declared {row.size} bytes, but {row.received} were received. "
                        "Send the rest, then finalize."
                    )
                os.ftruncate(descriptor, row.received)
                os.lseek(descriptor, 0, os.SEEK_SET)
                with os.fdopen(os.dup(descriptor), "rb") as blob:
                    digest = hashlib.file_digest(blob, "sha256").digest()
                os.fsync(descriptor)
                _sync_folder(self._store.blobs)
                now = self._store.clock()
                self._store.catalog.complete(row, digest, now, now + self._store.limits.lifetime)
        finally:
            os.close(descriptor)
        file = self.status(upload_id).file
        if file is None:
            raise NotFound(_NO_UPLOAD)
        return file

    def cancel(self, upload_id: str) -> None:
        """Drop what has arrived so far; an open writer notices when it next makes bytes safe.

        Raises ``NotFound``, and ``InvalidArgument`` for an upload that is complete.
        """
        row = self._row(upload_id)
        if not self._store.catalog.remove_unfinished(row):
            raise InvalidArgument(f"This upload is complete. To remove its file, delete 'files/{row.id}'.")
        self._store.discard(row.blob)

    def _row(self, upload_id: str) -> Row:
        row = self._store.catalog.upload(upload_id, self._store.clock())
        if row is None:
            raise NotFound(_NO_UPLOAD)
        return row

    def _locked(self, upload_id: str) -> tuple[Row, int]:
        """The row of an upload and its blob, open and locked until it is closed. Raises ``NotFound``, ``Aborted``."""
        blob = self._row(upload_id).blob
        descriptor = os.open(self._store.blobs / blob, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Aborted(
                    "Another request is writing to this upload. Wait for it, then query the offset."
                ) from None
            row = self._row(upload_id)
            if os.fstat(descriptor).st_size < row.received:
                self._store.catalog.forget(row.blob)
                raise NotFound("The bytes of this upload were lost on the server's disk. Start a new one.")
            return row, descriptor
        except BaseException as failure:
            os.close(descriptor)
            if isinstance(failure, NotFound):  # it was cancelled, perhaps just before its blob was made here
                self._store.discard(blob)
            raise

    def _new_row(self, new: NewFile) -> Row:
        name = new.name.removeprefix("files/")
        if name and not ID.fullmatch(name):
            raise InvalidArgument.at(
                "file.name",
                f"* File.name: {new.name[:64]!r} must be 1 to 40 lowercase letters, digits and dashes "
                "(not at the ends), or left out",
            )
        if len(new.display_name) > MAX_DISPLAY_NAME:
            raise InvalidArgument.at(
                "file.display_name",
                f"* File.display_name: has {len(new.display_name)} characters, but at most {MAX_DISPLAY_NAME} are kept",
            )
        now = self._store.clock()
        patience = WHOLE_SECONDS if new.whole else self._store.limits.upload_lifetime
        return Row(
            id=name or "".join(secrets.choice(_ALPHABET) for _ in range(_ID_LENGTH)),
            upload=secrets.token_urlsafe(32),
            owner=new.owner,
            display_name=new.display_name,
            mime_type=new.mime_type,
            size=new.size,
            received=0,
            held=new.size or 0,
            sha256=None,
            created=now,
            updated=now,
            expires=now + patience,
            blob=secrets.token_hex(16),
        )


class Writer:
    """Writes the bytes of one request; use it as a context manager, or close it.

    ``received`` is how many bytes of the upload there are. Closing makes them safe, also after a failure.
    """

    def __init__(self, store: FileStore, row: Row, descriptor: int, offset: int) -> None:
        self.received = self._safe = row.received
        self._store = store
        self._row = row
        self._descriptor = descriptor
        self._position = offset
        self._held = row.held
        self._patience = row.expires - row.updated
        self._kept_at = store.clock()
        self._busy = Lock()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, data: bytes) -> None:
        """The next bytes. Those that were received before are compared with what is kept.

        Raises ``InvalidArgument`` where they differ or are more than was declared, ``PayloadTooLarge`` and
        ``ResourceExhausted`` where they are over a limit, ``OSError`` where the disk is full, and ``NotFound`` if
        the upload was cancelled.
        """
        end = self._position + len(data)
        if self._row.size is not None and end > self._row.size:
            raise InvalidArgument(f"The upload has {self._row.size} bytes, but bytes up to {end} were sent.")
        with self._busy:
            known = data[: self.received - self._position]
            if known and os.pread(self._descriptor, len(known), self._position) != known:
                raise InvalidArgument(
                    f"The bytes from offset {self._position} on differ from those received before. "
                    "Cancel the upload to begin again."
                )
            if end > self.received:
                self._append(data[len(known) :])
            self._position = end

    def close(self) -> None:
        """Make the bytes safe and let others write, after a write that is under way. Raises ``NotFound`` if the upload
        was cancelled."""
        with self._busy:
            try:
                self._keep()
            finally:
                os.close(self._descriptor)

    def _append(self, data: bytes) -> None:
        end = self.received + len(data)
        if end > self._held:  # the upload did not declare its size
            with self._store.catalog.changing() as db:
                used = usage(db, self._row.owner, self._store.clock())
                _check_room(self._store.limits, used, end, before=self._held)
                hold(db, self._row, end)
            self._held = end
        self._store.need_disk(len(data))
        if self.received == self._safe:
            os.ftruncate(self._descriptor, self.received)
        left, offset = memoryview(data), self.received
        while left:
            written = os.pwrite(self._descriptor, left, offset)
            left, offset = left[written:], offset + written
        self.received = end
        if self.received - self._safe >= KEPT_EVERY or self._store.clock() - self._kept_at >= KEPT_SECONDS:
            self._keep()

    def _keep(self) -> None:
        if self.received == self._safe:
            return
        os.fdatasync(self._descriptor)
        if self._safe == 0:
            _sync_folder(self._store.blobs)
        now = self._store.clock()
        if not self._store.catalog.advance(self._row, self.received, now, now + self._patience):
            raise NotFound(_NO_UPLOAD)
        self._safe, self._kept_at = self.received, now


def _check_room(limits: FileLimits, used: StorageUsage, wanted: int, *, before: int = 0, files: int = 0) -> None:
    """Whether a file of ``wanted`` bytes, of which ``before`` are counted already, can be kept."""
    if wanted > limits.file_bytes:
        raise PayloadTooLarge(f"The file has {wanted} bytes or more; at most {limits.file_bytes} are kept.")
    quotas = (
        ("your files hold", "bytes", used.owner_bytes - before, wanted, limits.owner_bytes),
        ("all files hold", "bytes", used.total_bytes - before, wanted, limits.total_bytes),
        ("you have", "files", used.owner_files, files, limits.owner_files),
    )
    for what, unit, held, more, most in quotas:
        if held + more > most:
            raise ResourceExhausted(
                f"File storage is full: {what} {held} {unit}, and {more} more would be over the limit of {most}. "
                "Delete files, or wait until some expire.",
                retry_seconds=60,
            )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
