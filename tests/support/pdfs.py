"""PDF documents for tests, written by hand: only what a reader needs to find the text."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache


def pdf(*pages: str | bytes, deflate: bool = False) -> bytes:
    """A document with a line of Helvetica on each page; ``bytes`` are a page's content stream as they are."""
    streams = [page if isinstance(page, bytes) else _line(page) for page in pages]
    kids = " ".join(f"{4 + 2 * index} 0 R" for index in range(len(streams)))
    objects: list[bytes] = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(streams)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    for index, stream in enumerate(streams):
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] "
            b"/Resources << /Font << /F1 3 0 R >> >> /Contents %d 0 R >>" % (5 + 2 * index)
        )
        packed = zlib.compress(stream) if deflate else stream
        how = b" /Filter /FlateDecode" if deflate else b""
        objects.append(b"<< /Length %d%s >>\nstream\n%s\nendstream" % (len(packed), how, packed))
    return _file(objects)


@lru_cache(maxsize=1)
def bomb(megabytes: int) -> bytes:
    """A page whose content is a few kilobytes, deflated three times over, and grows to ``megabytes``."""
    # What is flushed in full depends on nothing before it, so that one megabyte is compressed for all (RFC 1950, 1951).
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(b" " * 2**20) + packer.flush(zlib.Z_FULL_FLUSH)
    size = megabytes * 2**20
    adler = (size + 16 * size * (size + 1)) % 65521 << 16 | (1 + 32 * size) % 65521  # of that many spaces
    data = b"\x78\xda" + megabytes * block + b"\x03\x00" + adler.to_bytes(4, "big")
    data = zlib.compress(zlib.compress(data, 9), 9)
    head = b"<< /Length %d /Filter [/FlateDecode /FlateDecode /FlateDecode] >>\nstream\n%s\nendstream"
    return _file(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R >>",
            head % (len(data), data),
        ]
    )


def slow() -> bytes:
    """A few kilobytes that take minutes: a thousand pages share a content of a million lines."""
    pages = 1000
    kids = b" ".join(b"%d 0 R" % (4 + index) for index in range(pages))
    content = zlib.compress(b"0 0 m 9 9 l S " * 1_000_000, 9)
    page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 3 0 R >>"
    return _file(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, pages),
            _stream(content, b" /Filter /FlateDecode"),
            *[page] * pages,
        ]
    )


def nested_forms(levels: int, fan: int = 2) -> bytes:
    """A page that draws a form, which draws the next one ``fan`` times, and so on: a text ``fan ** levels`` times."""
    objects: list[bytes] = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] "
        b"/Resources << /XObject << /X 6 0 R >> >> /Contents 4 0 R >>",
        _stream(b"/X Do"),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for level in range(levels):
        inside = b"/X Do " * fan
        more = b" /Type /XObject /Subtype /Form /BBox [0 0 612 792] /Resources << /XObject << /X %d 0 R >> >>" % (
            7 + level
        )
        objects.append(_stream(inside, more))
    font = b" /Type /XObject /Subtype /Form /BBox [0 0 612 792] /Resources << /Font << /F1 5 0 R >> >>"
    objects.append(_stream(_line("deep"), font))
    return _file(objects)


def form_loop() -> bytes:
    """A form that draws itself."""
    return nested_forms(1).replace(b"/X 7 0 R", b"/X 6 0 R")


def claiming(pages: int) -> bytes:
    """A document of one page that says it has ``pages``."""
    return pdf("one").replace(b"/Count 1", b"/Count %d" % pages)


def page_tree(levels: int) -> bytes:
    """A tree of pages as deep as ``levels``, with one page at its end."""
    nodes = [
        b"<< /Type /Pages /Kids [%d 0 R] /Count 1 %s>>"
        % (3 + level, b"/Parent %d 0 R " % (1 + level) if level else b"")
        for level in range(levels)
    ]
    leaf = b"<< /Type /Page /Parent %d 0 R /MediaBox [0 0 612 792] >>" % (1 + levels)
    return _file([b"<< /Type /Catalog /Pages 2 0 R >>", *nodes, leaf])


def page_loop() -> bytes:
    """A tree of pages that is its own branch."""
    return _file([b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [2 0 R 2 0 R] /Count 1000 >>"])


def xref_loop() -> bytes:
    """A table of objects that names itself as the one before."""
    document = pdf("loop")
    start = document.rindex(b"startxref\n") + len(b"startxref\n")
    table = document[start:].split(b"\n")[0]
    return document.replace(b"/Root 1 0 R", b"/Root 1 0 R /Prev " + table)


def deep_object(levels: int) -> bytes:
    """A catalog that holds an array in an array, and so on."""
    return pdf("x").replace(b"/Type /Catalog", b"/Type /Catalog /Deep " + b"[" * levels + b"]" * levels)


def deep_content(levels: int) -> bytes:
    """A page whose content is dictionaries in each other."""
    return pdf(b"/T " + b"<< /A " * levels + b">> " * levels + b"BDC BT (x) Tj ET EMC")


def many_objects(number: int) -> bytes:
    """A stream of objects that claims to hold ``number``."""
    stream = _stream(b"1 0 << >>", b" /Type /ObjStm /N %d /First 4" % number)
    return pdf("x").replace(b"trailer", b"99 0 obj\n" + stream + b"\nendobj\ntrailer")


def encrypted() -> bytes:
    """A document that nobody opens without its password."""
    document = pdf("secret")
    handler = b"<< /Filter /Standard /V 1 /R 2 /O <%s> /U <%s> /P -4 >>" % (b"00" * 32, b"11" * 32)
    return document.replace(b"/Root 1 0 R", b"/Root 1 0 R /ID [<00><00>] /Encrypt " + handler)


def _line(text: str) -> bytes:
    escaped = text.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
    return b"BT /F1 12 Tf 72 720 Td (%s) Tj ET" % escaped.encode("latin-1")


def _stream(data: bytes, more: bytes = b"") -> bytes:
    return b"<< /Length %d%s >>\nstream\n%s\nendstream" % (len(data), more, data)


def _file(objects: Sequence[bytes]) -> bytes:
    out = bytearray(b"%PDF-1.4\n")
    offsets = []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start)
    return bytes(out)
