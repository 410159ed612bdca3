"""Reads a PDF from its standard input and writes the text of its pages: a program of its own, run by `pdf.py`.

PDFium is a large C++ library, and here it reads untrusted input. So it runs without files, without keys and with little
memory, and a crash is just an exit status. It imports nothing of this project.
"""

from __future__ import annotations

import json
import resource
import sys
from contextlib import suppress

CPU_SECONDS = 30
UNREADABLE = 3
"""The exit status that marks the output as a sentence that says why."""


def main() -> int:
    """Arguments: how many bytes, pages and characters at most, how many bytes of memory, and the folders of libraries
    as JSON. Returns the exit status."""
    most_bytes, most_pages, most_characters, memory = map(int, sys.argv[1:5])
    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        with suppress(ValueError, OSError):  # a system without this limit
            resource.setrlimit(what, (most, most))
    sys.path[:] = json.loads(sys.argv[5])
    import pypdfium2

    data = sys.stdin.buffer.read(most_bytes + 1)
    if len(data) > most_bytes:
        return _refuse(f"it has more than {most_bytes} bytes")
    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        locked = "password" in str(error).lower()
        return _refuse("it is encrypted; remove the password first" if locked else "it is damaged, or no PDF document")
    if len(document) > most_pages:
        return _refuse(f"it has {len(document)} pages, but at most {most_pages} are read; send a part of it")
    written, blank = 0, True
    for number in range(len(document)):
        try:
            text = _page_text(document, number)
        except pypdfium2.PdfiumError:
            return _refuse(f"it is damaged: page {number + 1} cannot be read")
        written += len(text)
        blank = blank and not text.strip()
        if written > most_characters:
            return _refuse(f"its text has more than {most_characters} characters; send a part of it")
        _say(("\n\n" if number else "") + text)
    return _refuse("it has no extractable text (scanned pages?), and this server does not read images") if blank else 0


def _page_text(document: object, number: int) -> str:
    page = document[number]  # type: ignore[index]
    textpage = page.get_textpage()
    try:
        text: str = textpage.get_text_range()
    finally:
        textpage.close()
        page.close()
    return text.replace("\r\n", "\n").replace("\0", "").replace("\ufffe", "-").strip()


def _refuse(sentence: str) -> int:
    _say(f"\0{sentence}")  # no page holds a NUL: what follows it is the reason, whatever was written before
    return UNREADABLE


def _say(text: str) -> None:
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))


if __name__ == "__main__":
    sys.exit(main())
