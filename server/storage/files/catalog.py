"""The catalog of files, in SQLite: the authority on which exist, complete or being uploaded.

A row is created before its blob and deleted before it. So a crash leaves at worst an orphaned blob, and never a row
without its blob. WAL and short transactions make the catalog safe for several server processes.
"""

from __future__ import annotations

import fcntl
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from threading import Lock

BUSY_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Row:
    """A file. ``upload`` is the id of its upload, current or recent, ``size`` the declared one (None if undeclared),
    ``held`` the bytes that count against quotas. ``sha256`` is None until the file is complete. Times are seconds of
    the epoch; a file is gone when it ``expires``, whatever the state of its upload.
    """

    id: str
    upload: str | None
    owner: str
    display_name: str
    mime_type: str
    size: int | None
    received: int
    held: int
    sha256: bytes | None
    created: float
    updated: float
    expires: float
    blob: str


@dataclass(frozen=True, slots=True)
class StorageUsage:
    """What is held now: the bytes and files of one owner, and the bytes of all."""

    owner_bytes: int
    owner_files: int
    total_bytes: int


_COLUMNS = ", ".join(field.name for field in fields(Row))
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY,
    upload TEXT UNIQUE,
    owner TEXT NOT NULL,
    display_name TEXT NOT NULL,
    mime_type TEXT NOT NULL,
    size INTEGER,
    received INTEGER NOT NULL,
    held INTEGER NOT NULL,
    sha256 BLOB,
    created REAL NOT NULL,
    updated REAL NOT NULL,
    expires REAL NOT NULL,
    blob TEXT NOT NULL UNIQUE
);
CREATE INDEX IF NOT EXISTS files_of_owner ON files (owner, created, id);
CREATE INDEX IF NOT EXISTS files_expiring ON files (expires);
"""


class Catalog:
    """The table of files. Every method is one transaction; changes are on disk when it returns. Thread-safe.

    ``now`` in a query hides what has expired by then. Raises ``sqlite3.Error`` where the database cannot be used, and
    ``OSError`` where its files cannot be made private to their owner.
    """

    def __init__(self, path: Path) -> None:
        self._lock = Lock()
        # SQLite makes its other files with the mode of the database. None of them is opened here: closing one would
        # give up the locks that this process holds on it.
        for name in (path, path.with_suffix(".lock")):
            with suppress(FileExistsError):
                name.touch(0o600, exist_ok=False)
        for name in path.parent.glob(f"{path.stem}.*"):
            keep_private(name)
        self._db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        with path.with_suffix(".lock").open("w") as alone:
            # The switch to WAL does not wait for others: of servers that start together, one would fail.
            fcntl.flock(alone, fcntl.LOCK_EX)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.executescript(_SCHEMA)
        self._db.execute("PRAGMA synchronous = FULL")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def changing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that no other process interleaves with: kept whole, or not at all where the block raises."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.rollback()
                raise
            self._db.commit()

    def file(self, file_id: str, now: float) -> Row | None:
        """The file with this id, complete or not."""
        return self._one("SELECT * FROM files WHERE id = ? AND expires > ?", file_id, now)

    def upload(self, upload_id: str, now: float) -> Row | None:
        """The file of an upload."""
        return self._one("SELECT * FROM files WHERE upload = ? AND expires > ?", upload_id, now)

    def page(self, owner: str, size: int, before: tuple[float, str], now: float) -> list[Row]:
        """Complete files of an owner that come before (created, id), newest first."""
        with self._lock:
            found = self._db.execute(
                f"SELECT {_COLUMNS} FROM files WHERE owner = ? AND sha256 IS NOT NULL AND expires > ?"
                " AND (created, id) < (?, ?) ORDER BY created DESC, id DESC LIMIT ?",
                (owner, now, *before, size),
            ).fetchall()
        return [Row(*values) for values in found]

    def blobs(self) -> dict[str, bool]:
        """The blob of every row, and whether it must be there: a blob is created when its first bytes arrive."""
        with self._lock:
            found = self._db.execute("SELECT blob, sha256 IS NOT NULL OR received > 0 FROM files").fetchall()
        return {blob: bool(needed) for blob, needed in found}

    def advance(self, row: Row, received: int, now: float, expires: float) -> bool:
        """Record how much of an upload is safely in its blob; False if the upload has ended meanwhile."""
        with self.changing() as db:
            return _changed(
                db.execute(
                    "UPDATE files SET received = ?, held = max(held, ?), updated = ?, expires = ?"
                    " WHERE blob = ? AND sha256 IS NULL",
                    (received, received, now, expires, row.blob),
                )
            )

    def complete(self, row: Row, sha256: bytes, now: float, expires: float) -> bool:
        """Make an upload's file visible with all that it has received; False if the upload has ended meanwhile."""
        with self.changing() as db:
            return _changed(
                db.execute(
                    "UPDATE files SET sha256 = ?, size = received, held = received, updated = ?, expires = ?"
                    " WHERE blob = ? AND sha256 IS NULL",
                    (sha256, now, expires, row.blob),
                )
            )

    def remove_unfinished(self, row: Row) -> bool:
        """Forget a file that is not complete; its blob is orphaned from then on. False if it is complete."""
        with self.changing() as db:
            return _changed(db.execute("DELETE FROM files WHERE blob = ? AND sha256 IS NULL", (row.blob,)))

    def forget(self, blob: str) -> bool:
        """Forget the file of this blob."""
        with self.changing() as db:
            return _changed(db.execute("DELETE FROM files WHERE blob = ?", (blob,)))

    def expire(self, now: float, uploads_over: float) -> list[str]:
        """Forget what has expired, and the ids of uploads that were complete at ``uploads_over``. Returns blobs."""
        with self.changing() as db:
            gone = db.execute("DELETE FROM files WHERE expires <= ? RETURNING blob", (now,)).fetchall()
            db.execute(
                "UPDATE files SET upload = NULL WHERE upload IS NOT NULL AND sha256 IS NOT NULL AND updated <= ?",
                (uploads_over,),
            )
        return [blob for (blob,) in gone]

    def _one(self, query: str, *values: object) -> Row | None:
        with self._lock:
            found = self._db.execute(query.replace("*", _COLUMNS, 1), values).fetchone()
        return Row(*found) if found else None


def keep_private(path: Path) -> None:
    """Make a file or folder accessible to its owner only, if it exists. Raises ``OSError``."""
    with suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if mode & 0o077:
            path.chmod(stat.S_IMODE(mode) & 0o700)


def usage(db: sqlite3.Connection, owner: str, now: float) -> StorageUsage:
    """What is held, within a transaction of ``Catalog.changing``."""
    query = (
        "SELECT coalesce(sum(held) FILTER (WHERE owner = ?), 0), count(*) FILTER (WHERE owner = ?),"
        " coalesce(sum(held), 0) FROM files WHERE expires > ?"
    )
    return StorageUsage(*db.execute(query, (owner, owner, now)).fetchone())


def insert(db: sqlite3.Connection, row: Row) -> bool:
    """Add a file, within a transaction; False if its id is taken by one that has not expired."""
    db.execute("DELETE FROM files WHERE id = ? AND expires <= ?", (row.id, row.created))
    places = ", ".join("?" * len(fields(Row)))
    return _changed(db.execute(f"INSERT OR IGNORE INTO files ({_COLUMNS}) VALUES ({places})", astuple(row)))


def hold(db: sqlite3.Connection, row: Row, held: int) -> None:
    """Count more bytes for an upload, within a transaction."""
    db.execute("UPDATE files SET held = max(held, ?) WHERE blob = ?", (held, row.blob))


def _changed(cursor: sqlite3.Cursor) -> bool:
    return cursor.rowcount > 0
