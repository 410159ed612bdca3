"""Bytes of a request on their way into an upload: gathered, handed over, kept or dropped."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest

from server.errors import InvalidArgument
from server.storage.files import intake as intake_module
from server.storage.files.intake import GATHERED_BYTES, intake, take_whole
from server.storage.files.store import FileStore
from server.storage.files.upload import NewFile, Uploads


@pytest.fixture
def store(tmp_path: Path):
    found = FileStore(tmp_path / "files")
    yield found
    found.close()


async def pieces(data: Iterable[bytes], failure: Exception | None = None) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece
    if failure is not None:
        raise failure


async def test_what_comes_is_kept_whatever_ends_it(store: FileStore) -> None:
    uploads = Uploads(store)
    upload = uploads.start(NewFile("me"))

    async def hung_up() -> None:
        async with intake(uploads, upload, 0) as taking:
            await taking.add(b"abc")
            raise ConnectionError

    with pytest.raises(ConnectionError):
        await hung_up()
    assert uploads.status(upload).received == 3


async def test_bytes_are_gathered_up_to_a_bound(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = Uploads(store)
    upload = uploads.start(NewFile("me"))
    (blob,) = store.catalog.blobs()
    async with intake(uploads, upload, 0) as taking:
        await taking.add(b"x" * (GATHERED_BYTES - 1))
        assert (store.blobs / blob).stat().st_size == 0
        await taking.add(b"y")
        assert (store.blobs / blob).stat().st_size == GATHERED_BYTES
        monkeypatch.setattr(intake_module, "GATHERED_SECONDS", 0.0)
        await taking.add(b"z")
        assert (store.blobs / blob).stat().st_size == GATHERED_BYTES + 1


async def test_a_whole_file_is_kept_whole(store: FileStore) -> None:
    data = [random.Random(number).randbytes(300_000) for number in range(9)]
    file = await take_whole(Uploads(store), NewFile("me", display_name="n"), pieces(data))
    with store.open(file) as blob:
        assert blob.read() == b"".join(data)
    assert store.get(file.id, "me").display_name == "n"


@pytest.mark.parametrize("failure", [ConnectionError(), InvalidArgument("wrong")])
async def test_or_not_at_all(store: FileStore, failure: Exception) -> None:
    with pytest.raises(type(failure)):
        await take_whole(Uploads(store), NewFile("me"), pieces([b"abc"], failure))
    with pytest.raises(InvalidArgument, match="declared 4"):
        await take_whole(Uploads(store), NewFile("me", size=4), pieces([b"abc"]))
    assert store.catalog.blobs() == {}
    assert list(store.blobs.iterdir()) == []
