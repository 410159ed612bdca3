"""The text of PDF documents, and documents made to do harm."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest
from support.pdfs import bomb, encrypted, pdf
from support.processes import until

from server.convert import pdf as pdf_module
from server.convert.media import Unreadable
from server.convert.pdf import MAX_PAGES, PdfReader


async def text(data: bytes) -> str:
    return await PdfReader().text(data, b"")


@pytest.mark.parametrize("deflate", [True, False])
async def test_the_pages_in_their_order(deflate: bool) -> None:
    assert await text(pdf("Hello world", "", "Third (page) \\ é", deflate=deflate)) == (
        "Hello world\n\n\n\nThird (page) \\ é"
    )


async def test_a_stored_file_is_read_from_its_descriptor(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf("from disk"))
    with (tmp_path / "a.pdf").open("rb") as file:
        assert await PdfReader().text(file, b"") == "from disk"


async def test_as_many_pages_as_are_allowed_and_one_more() -> None:
    whole = await text(pdf(*(f"page {number}" for number in range(MAX_PAGES))))
    assert whole.split("\n\n")[-1] == f"page {MAX_PAGES - 1}"
    with pytest.raises(Unreadable, match=f"{MAX_PAGES + 1} pages, but at most {MAX_PAGES}"):
        await text(pdf(*["x"] * (MAX_PAGES + 1)))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "damaged"),
        (b"%PDF-1.4 and then nothing", "damaged"),
        (pdf("cut in the middle")[:300], "damaged|no text"),
        (encrypted(), "encrypted"),
        (pdf(b"q 1 0 0 1 0 0 cm Q"), "pictures"),
        (pdf("", " "), "pictures"),
    ],
)
async def test_what_holds_no_text_is_refused_with_the_reason(data: bytes, words: str) -> None:
    with pytest.raises(Unreadable, match=words):
        await text(data)


async def test_a_bomb_is_refused_and_takes_no_memory_here() -> None:
    before = resident_kilobytes()
    with pytest.raises(Unreadable):
        await text(bomb(3000))
    assert resident_kilobytes() - before < 50_000


async def test_too_many_characters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf_module, "MAX_CHARACTERS", 10)
    assert await text(pdf("1234567890")) == "1234567890"
    with pytest.raises(Unreadable, match="more than 10 characters"):
        await text(pdf("12345", "678901"))


async def test_too_many_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    document = pdf("x")
    monkeypatch.setattr(pdf_module, "MAX_BYTES", len(document))
    assert await text(document) == "x"
    with pytest.raises(Unreadable, match=f"more than {len(document)} bytes"):
        await text(document + b"\n")


async def test_the_deadline_ends_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf_module, "DEADLINE_SECONDS", 0.001)
    with pytest.raises(Unreadable, match=r"more than 0\.001 seconds"):
        await text(pdf("x"))


async def test_who_goes_away_takes_the_child_along(monkeypatch: pytest.MonkeyPatch) -> None:
    children = []
    start = asyncio.create_subprocess_exec

    async def noting(*command: str, **options: object) -> asyncio.subprocess.Process:
        children.append(await start(*command, **options))
        return children[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noting)
    reading = asyncio.create_task(text(pdf(*["x"] * 900)))
    await until(lambda: bool(children))
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert children[0].returncode is not None


async def test_a_document_is_read_once() -> None:
    reader = PdfReader()
    assert await reader.text(pdf("first"), b"digest") == "first"
    assert await reader.text(io.BytesIO(b"never read"), b"digest") == "first"


async def test_a_refusal_is_remembered_too() -> None:
    reader = PdfReader()
    for source in (b"no document", pdf("never read")):
        with pytest.raises(Unreadable, match="damaged"):
            await reader.text(source, b"digest")


async def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf_module, "REMEMBERED_CHARACTERS", 2007)
    reader = PdfReader()
    for name in (b"one", b"two", b"six"):
        await reader.text(pdf(name.decode()), name)
    assert list(reader._known) == [b"two", b"six"]


def resident_kilobytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
