"""The text of PDF documents, and documents made to do harm."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from support import pdfs
from support.pdfs import bomb, encrypted, pdf
from support.processes import until

from server.errors import ResourceExhausted
from server.media import pdf as pdf_module
from server.media import pdf_text
from server.media.media_types import Unreadable
from server.media.pdf import AT_ONCE, MAX_PAGES, PdfReader, ReadingClock


async def text(data: bytes) -> str:
    return await read(PdfReader(), data)


async def read(reader: PdfReader, source: BinaryIO | bytes, digest: bytes = b"", owner: str = "") -> str:
    async with asyncio.timeout(None) as reading:
        return await reader.text(source, digest, owner, ReadingClock(reading))


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.subprocess.Process]:
    """Every process that is started, in order."""
    found: list[asyncio.subprocess.Process] = []
    start = asyncio.create_subprocess_exec

    async def noting(*command: str, **options: Any) -> asyncio.subprocess.Process:
        found.append(await start(*command, **options))
        return found[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noting)
    return found


@pytest.mark.parametrize("deflate", [True, False])
async def test_the_pages_in_their_order(deflate: bool) -> None:
    assert await text(pdf("Hello world", "", "Third (page) \\ é", deflate=deflate)) == (
        "Hello world\n\n\n\nThird (page) \\ é"
    )


async def test_a_stored_file_is_read_from_its_descriptor(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf("from disk"))
    with (tmp_path / "a.pdf").open("rb") as file:
        assert await read(PdfReader(), file) == "from disk"


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
        (pdf(b"q 1 0 0 1 0 0 cm Q"), "extractable text"),
        (pdf("", " "), "extractable text"),
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


async def test_who_goes_away_takes_the_child_along_and_frees_its_reader(
    children: list[asyncio.subprocess.Process],
) -> None:
    reader = PdfReader()
    tasks = [asyncio.create_task(read(reader, pdfs.slow(), bytes([index]))) for index in range(AT_ONCE)]
    await until(lambda: len(children) == AT_ONCE)
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    assert children[0].returncode == -signal.SIGKILL
    assert await read(reader, pdf("next"), b"next") == "next"
    tasks[1].cancel()
    await asyncio.wait(tasks)


async def test_a_document_is_read_once() -> None:
    reader = PdfReader()
    assert await read(reader, pdf("first"), b"digest") == "first"
    assert await read(reader, io.BytesIO(b"never read"), b"digest") == "first"


async def test_who_waits_for_a_document_that_is_being_read_gets_the_same(
    children: list[asyncio.subprocess.Process],
) -> None:
    reader = PdfReader()
    same = [read(reader, pdf("same"), b"digest") for _ in range(AT_ONCE + 3)]
    assert await asyncio.gather(*same) == ["same"] * (AT_ONCE + 3)
    assert len(children) <= AT_ONCE


async def test_a_refusal_is_remembered_too() -> None:
    reader = PdfReader()
    for source in (b"no document", pdf("never read")):
        with pytest.raises(Unreadable, match="damaged"):
            await read(reader, source, b"digest")


async def test_a_time_out_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = PdfReader()
    with monkeypatch.context() as hurried:
        hurried.setattr(pdf_module, "DEADLINE_SECONDS", 0.001)
        with pytest.raises(Unreadable, match="seconds"):
            await read(reader, pdf("in time"))
    assert await read(reader, pdf("in time")) == "in time"


async def test_a_reader_that_died_is_not_remembered() -> None:
    reader = PdfReader()
    with pytest.raises(Unreadable, match="memory"):
        await read(reader, bomb(3000))
    assert await read(reader, pdf("now it fits")) == "now it fits"


async def test_a_reader_that_the_system_killed_says_nothing_about_the_document(
    children: list[asyncio.subprocess.Process],
) -> None:
    reader = PdfReader()
    reading = asyncio.create_task(read(reader, pdfs.slow()))
    await until(lambda: bool(children))
    os.kill(children[0].pid, signal.SIGKILL)
    with pytest.raises(ResourceExhausted, match="too little memory"):
        await reading
    assert await read(reader, pdf("another try")) == "another try"


async def test_waiting_for_a_reader_does_not_count_as_reading() -> None:
    reader = PdfReader()
    async with AsyncExitStack() as others, asyncio.timeout(1000) as reading:
        for _ in range(AT_ONCE):
            await others.enter_async_context(reader._readers.of("another"))
        before, clock = reading.when(), ReadingClock(reading)
        waiting = asyncio.create_task(reader.text(pdf("at last"), b"", "me", clock))
        await until(lambda: bool(reader._readers._waiting))
        assert reading.when() is None
        await others.aclose()
        assert await waiting == "at last"
        after = reading.when()
        assert before is not None
        assert after is not None
        assert after > before
        assert clock.patience == pytest.approx(pdf_module.PATIENCE_SECONDS - (after - before))


async def test_who_waits_too_long_is_told_that_others_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf_module, "PATIENCE_SECONDS", 0.01)
    reader = PdfReader()
    async with AsyncExitStack() as others:
        for _ in range(AT_ONCE):
            await others.enter_async_context(reader._readers.of("another"))
        with pytest.raises(ResourceExhausted, match="Documents of other requests are being read"):
            await read(reader, pdf("too late"))
    assert await read(reader, pdf("too late")) == "too late"


async def test_an_owner_with_many_documents_lets_others_take_their_turn() -> None:
    reader, order = PdfReader(), list[str]()

    async def one(owner: str, index: int) -> None:
        await read(reader, pdf(f"{owner}{index}"), f"{owner}{index}".encode(), owner)
        order.append(owner)

    async with asyncio.TaskGroup() as tasks:
        for index in range(12):
            tasks.create_task(one("many", index))
        await until(lambda: sum(map(len, reader._readers._waiting.values())) == 12 - AT_ONCE)
        tasks.create_task(one("single", 0))
    # At most the two that are being read, the one whose turn is next, and its neighbour are before it.
    assert order.index("single") <= AT_ONCE + 2


async def test_libraries_are_found_where_this_process_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pypdfium2.py").write_text("raise SystemExit(7)")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(Unreadable):
        await text(pdf("x"))


@pytest.mark.parametrize(
    ("make", "outcome"),
    [
        (lambda: pdfs.nested_forms(12), "deep"),  # a text four thousand times in the same place is one
        (lambda: pdfs.nested_forms(28), None),
        (pdfs.form_loop, None),
        (lambda: pdfs.claiming(10**9), "one"),
        (lambda: pdfs.claiming(-1), "one"),
        (lambda: pdfs.claiming(900), "page 2 cannot be read"),
        (lambda: pdfs.page_tree(5_000), None),
        (pdfs.page_loop, None),
        (pdfs.xref_loop, "loop"),
        (lambda: pdfs.deep_object(100_000), "x"),
        (lambda: pdfs.deep_content(1_000_000), None),
        (lambda: pdfs.many_objects(2**31 - 1), "x"),
    ],
)
async def test_a_document_made_to_do_harm_ends_in_its_text_or_a_refusal(
    make: Callable[[], bytes], outcome: str | None
) -> None:
    """What becomes of one may change with PDFium; that nothing here suffers may not. Without an ``outcome`` either is
    right."""
    document = make()
    before = resident_kilobytes()
    try:
        told = await text(document)
    except Unreadable as refusal:
        told = str(refusal)
    assert outcome is None or outcome in told
    assert len(told) < 1000
    assert resident_kilobytes() - before < 50_000


async def test_a_document_that_takes_minutes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf_module, "DEADLINE_SECONDS", 2.0)
    with pytest.raises(Unreadable, match="more than 2 seconds; send a part of it"):
        await text(pdfs.slow())


async def test_no_reader_has_more_memory_or_time_than_its_limits(children: list[asyncio.subprocess.Process]) -> None:
    reading = asyncio.create_task(text(pdfs.slow()))
    await until(lambda: bool(children) and "1073741824" in limits_of(children[0].pid))
    assert "Max address space         1073741824" in limits_of(children[0].pid)
    assert f"Max cpu time              {pdf_text.CPU_SECONDS} " in limits_of(children[0].pid)
    assert "Max file size             0" in limits_of(children[0].pid)
    reading.cancel()
    await asyncio.wait([reading])


async def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf_module, "REMEMBERED_CHARACTERS", 2007)
    reader = PdfReader()
    for name in (b"one", b"two", b"six"):
        await read(reader, pdf(name.decode()), name)
    assert list(reader._known) == [b"two", b"six"]


def limits_of(pid: int) -> str:
    return Path(f"/proc/{pid}/limits").read_text()


def resident_kilobytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
