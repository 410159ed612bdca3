"""The store of files: metadata in a catalog, bytes in blobs, limits on both.

Layout of the folder: ``files.db`` and ``blobs/``, one file for each upload under a unique name that is never reused. An
upload becomes a file by one transaction of the catalog; nothing is renamed or copied. All of it is readable by the
owner only, whatever the umask.
"""

from __future__ import annotations

import base64
import errno
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from server.errors import InvalidArgument, PermissionDenied
from server.storage.files.catalog import Catalog, Row, keep_private

GIB = 1024**3
FINISHED_SECONDS = 600.0
"""How long a complete upload still answers a client that lost the answer to its last request."""

KEPT_FREE = 8 * 1024**2
"""Bytes of the disk that uploads leave free: the catalog must still be able to record deletions."""

ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")
_TOKEN = re.compile(rf"(\d+\.\d+) ({ID.pattern})")
_END = (float("inf"), "")


@dataclass(frozen=True, slots=True)
class FileLimits:
    """Bytes and seconds. ``lifetime`` is a file's, ``upload_lifetime`` that of an upload that receives nothing."""

    file_bytes: int = 2 * GIB
    owner_bytes: int = 20 * GIB
    total_bytes: int = 100 * GIB
    owner_files: int = 10_000
    lifetime: float = 48 * 3600.0
    upload_lifetime: float = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A complete file; ``size`` in bytes, times in seconds of the epoch."""

    id: str
    owner: str
    display_name: str
    mime_type: str
    size: int
    sha256: bytes
    created: float
    updated: float
    expires: float
    blob: str


class FileStore:
    """Files by id; each belongs to the identity that uploaded it. Methods block: call them in a thread.

    Several processes may share ``folder``. Raises ``OSError`` or ``sqlite3.Error`` where it cannot be used.
    """

    def __init__(self, folder: Path, limits: FileLimits | None = None, clock: Callable[[], float] = time.time) -> None:
        self.limits = limits or FileLimits()
        self.clock = clock
        self.blobs = folder / "blobs"
        for made in (folder, self.blobs):
            made.mkdir(parents=True, exist_ok=True, mode=0o700)
            keep_private(made)
        for blob in self.blobs.iterdir():
            keep_private(blob)
        self.catalog = Catalog(folder / "files.db")

    def get(self, file_id: str, owner: str) -> StoredFile:
        """Raises ``PermissionDenied``, in the same words where it does not exist, is not complete or belongs to another
        identity: nobody learns which ids there are."""
        found = stored(self._row(file_id, owner))
        if found is None:
            raise _inaccessible(file_id)
        return found

    def page(self, owner: str, size: int, token: str) -> tuple[list[StoredFile], str]:
        """At most ``size`` files of an owner, newest first, and the token of the next page, "" on the last one.

        Raises ``InvalidArgument`` for a token that this server has not made.
        """
        before = _END
        if token:
            try:
                place = _TOKEN.fullmatch(base64.urlsafe_b64decode(token.encode()).decode())
            except ValueError:
                place = None
            if place is None:
                raise InvalidArgument.at(
                    "page_token", f"* ListFilesRequest.page_token: {token[:64]!r} is not a nextPageToken of this server"
                )
            before = float(place[1]), place[2]
        rows = self.catalog.page(owner, size + 1, before, self.clock())
        files = [file for file in map(stored, rows[:size]) if file]
        if len(rows) <= size or not files:
            return files, ""
        last = files[-1]
        return files, base64.urlsafe_b64encode(f"{last.created:.9f} {last.id}".encode()).decode()

    def delete(self, file_id: str, owner: str) -> None:
        """Raises as `get` does. Downloads that have begun continue. A file that is being uploaded is dropped, and its
        name is free: a client that lost the address of an upload can start again."""
        row = self._row(file_id, owner)
        self.catalog.forget(row.blob)
        self.discard(row.blob)

    def open(self, file: StoredFile) -> BinaryIO:
        """The bytes of a file. Raises ``PermissionDenied`` if it was removed since it was looked up."""
        try:
            return (self.blobs / file.blob).open("rb")
        except FileNotFoundError:
            raise _inaccessible(file.id) from None

    def sweep(self) -> int:
        """Remove what has expired, blobs that no row names and rows whose blob is lost; returns how many."""
        now = self.clock()
        gone = self.catalog.expire(now, now - FINISHED_SECONDS)
        for blob in gone:
            self.discard(blob)
        # Rows come before their blobs: a blob that is listed first and has no row afterwards will never have one.
        present = {path.name for path in self.blobs.iterdir()}
        known = self.catalog.blobs()
        orphans = present - known.keys()
        for blob in orphans:
            self.discard(blob)
        missing = [blob for blob, needed in known.items() if needed and not (self.blobs / blob).exists()]
        lost = sum(self.catalog.forget(blob) for blob in missing)
        return len(gone) + len(orphans) + lost

    def need_disk(self, more: int) -> None:
        """Raises ``OSError`` as the disk would, but slightly earlier, where it has no room for this many bytes."""
        disk = os.statvfs(self.blobs)
        if disk.f_bavail * disk.f_frsize < more + KEPT_FREE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.blobs))

    def discard(self, blob: str) -> None:
        """Remove a blob that no row names any more."""
        (self.blobs / blob).unlink(missing_ok=True)

    def _row(self, file_id: str, owner: str) -> Row:
        row = self.catalog.file(file_id, self.clock()) if ID.fullmatch(file_id) else None
        if row is None or row.owner != owner:
            raise _inaccessible(file_id)
        return row

    def close(self) -> None:
        """Close the database; the store cannot be used afterwards."""
        self.catalog.close()


def _inaccessible(file_id: str) -> PermissionDenied:
    """In the words of the real service (wire reference 5.2)."""
    return PermissionDenied(f"You do not have permission to access the File {file_id[:64]} or it may not exist.")


def stored(row: Row) -> StoredFile | None:
    """A row as a file; None while it is being uploaded."""
    if row.sha256 is None:
        return None
    return StoredFile(
        row.id,
        row.owner,
        row.display_name,
        row.mime_type,
        row.received,
        row.sha256,
        row.created,
        row.updated,
        row.expires,
        row.blob,
    )
