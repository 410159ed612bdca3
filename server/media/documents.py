"""Documents in a conversation: uploaded files and inline data become the text that the model reads.

Nothing is fetched from a URL and nothing read from a path: what is named must be a file that was uploaded here, by the
same caller.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import BinaryIO

from server.errors import FieldViolation, InvalidArgument, PermissionDenied
from server.media.media_types import (
    PDF,
    UNKNOWN,
    Unreadable,
    check_pdf,
    declared_type,
    decoded,
    guessed_type,
    is_text,
    refused,
)
from server.media.pdf import MAX_BYTES as MAX_PDF_BYTES
from server.media.pdf import PdfReader, ReadingClock
from server.storage.files.store import ID, FileStore
from server.wire.content import Blob, Content, FileData, Part
from server.wire.fields import shown
from server.wire.requests import GenerateContentRequest
from server.wire.support import joined

MAX_DOCUMENTS = 100
READ_SECONDS = 60.0
"""For all documents of a request, not counting the wait for a free reader: no request may hold one for long."""
MAX_TEXT_BYTES = 20 * 1024**2
"""Of all texts of a request together, as much as a request without files may hold."""

_URI = re.compile(rf"(?:[^\s?#]{{0,2000}}/)?files/({ID.pattern})")
_SYSTEM = -1

Place = tuple[int, int]
"""The place of a content, ``_SYSTEM`` for the system instruction, and that of a part in it."""


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of a request as texts, by their places."""

    texts: Mapping[Place, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.texts)

    def within(self, request: GenerateContentRequest, *, emptied: bool = False) -> GenerateContentRequest:
        """The request with its documents as text parts; ``emptied`` with empty texts in their place."""
        if not self.texts:
            return request
        texts = dict.fromkeys(self.texts, "") if emptied else self.texts
        contents = tuple(_replaced(content, index, texts) for index, content in enumerate(request.contents))
        system = request.system_instruction
        changed = {"contents": contents, "system_instruction": system and _replaced(system, _SYSTEM, texts)}
        return request.model_copy(update=changed)


NO_DOCUMENTS = Documents()


class DocumentReader:
    """Reads the documents of requests, stored and inline ones."""

    def __init__(self, store: FileStore) -> None:
        self._store = store
        self._pdf = PdfReader()

    async def read(self, request: GenerateContentRequest, owner: str) -> Documents:
        """Every document of a request. Raises ``InvalidArgument`` naming each that cannot be read, ``PermissionDenied``
        for a file that is not there or not the caller's, and ``ResourceExhausted`` while too many others are being
        read."""
        found = list(_parts_with_documents(request))
        if len(found) > MAX_DOCUMENTS:
            raise InvalidArgument.at(
                "contents", f"contents hold {len(found)} documents, but at most {MAX_DOCUMENTS} are read"
            )
        try:
            async with asyncio.timeout(READ_SECONDS) as reading:
                return await self._read_all(found, owner, ReadingClock(reading))
        except TimeoutError:
            raise InvalidArgument.at(
                "contents", f"contents: reading the documents takes more than {READ_SECONDS:g} seconds; send fewer"
            ) from None

    async def _read_all(self, found: Sequence[tuple[Place, str, Part]], owner: str, clock: ReadingClock) -> Documents:
        texts: dict[Place, str] = {}
        problems: list[FieldViolation] = []
        left = MAX_TEXT_BYTES
        for place, path, part in found:
            try:
                name, text = await self._read(part, path, owner, left, clock)
            except Unreadable as problem:
                problems.append(FieldViolation(path, f"{path}: {problem}"))
                continue
            left -= await asyncio.to_thread(_size_of, text)
            # Marks show where a document begins and ends, and its name.
            named = f" name={json.dumps(name, ensure_ascii=False)}" if name else ""
            start = "" if place[1] == 0 else "\n"
            texts[place] = f"{start}<document{named}>\n{text}\n</document>\n"
        if problems:
            raise joined(problems)
        return Documents(texts)

    async def _read(self, part: Part, path: str, owner: str, most: int, clock: ReadingClock) -> tuple[str, str]:
        """The name of a document and its text."""
        if part.file_data is not None:
            return await self._read_stored(part.file_data, path, owner, most, clock)
        assert part.inline_data is not None
        blob = part.inline_data
        if not blob.data and not blob.mime_type:
            raise Unreadable("it holds nothing; send mimeType and data")
        digest = await asyncio.to_thread(lambda: hashlib.sha256(blob.data).digest())
        return blob.display_name, await self._text(_InlineSource(blob), digest, owner, most, clock)

    async def _read_stored(
        self, data: FileData, path: str, owner: str, most: int, clock: ReadingClock
    ) -> tuple[str, str]:
        uri = _URI.fullmatch(data.file_uri)
        if uri is None or (":/" in data.file_uri and not data.file_uri.startswith(("http://", "https://"))):
            raise Unreadable(
                f"{shown(data.file_uri)} is no file of this server. Nothing is fetched from other addresses: upload "
                "the file (POST upload/v1beta/files), and send the uri it returns"
            )
        try:
            file = await asyncio.to_thread(self._store.get, uri[1], owner)
            blob = await asyncio.to_thread(self._store.open, file)
        except PermissionDenied as refusal:
            raise PermissionDenied(f"{refusal.message} It is named at {path}.") from None
        with blob:
            source = _StoredSource(data.mime_type or file.mime_type, file.size, blob)
            return file.display_name or data.display_name, await self._text(source, file.sha256, owner, most, clock)

    async def _text(self, source: _Source, digest: bytes, owner: str, most: int, clock: ReadingClock) -> str:
        kind, charset = declared_type(source.mime_type)
        head = await asyncio.to_thread(source.head)
        if kind in ("", UNKNOWN):
            kind = guessed_type(head)
        if kind == PDF:
            check_pdf(head)
            _check_size(source.size, MAX_PDF_BYTES)
            text = await self._pdf.text(source.whole, digest, owner, clock)
            _check_size(await asyncio.to_thread(_size_of, text), most)
            return text
        if not is_text(kind):
            raise refused(kind)
        _check_size(source.size, most)
        return await asyncio.to_thread(lambda: decoded(source.content(), kind, charset))


class _StoredSource:
    """A document in the store; ``whole`` is what a child process can read it from."""

    def __init__(self, mime_type: str, size: int, blob: BinaryIO) -> None:
        self.mime_type = mime_type
        self.size = size
        self.whole = blob

    def head(self) -> bytes:
        # The child reads on from the descriptor's position, so it must not move here.
        return os.pread(self.whole.fileno(), 1024, 0)

    def content(self) -> bytes:
        return self.whole.read()


class _InlineSource:
    """A document within the request."""

    def __init__(self, blob: Blob) -> None:
        self.mime_type = blob.mime_type
        self.size = len(blob.data)
        self.whole = blob.data

    def head(self) -> bytes:
        return self.whole[:1024]

    def content(self) -> bytes:
        return self.whole


_Source = _StoredSource | _InlineSource


def _size_of(text: str) -> int:
    """In bytes, as it would take in a request."""
    return len(text.encode())


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise Unreadable(f"it has {size} bytes, but only {most} can still be read; send a part of it")


def has_documents(request: GenerateContentRequest) -> bool:
    """Whether anything of a request must be read before it can be shown to the model."""
    return any(True for _ in _parts_with_documents(request))


def _parts_with_documents(request: GenerateContentRequest) -> Iterator[tuple[Place, str, Part]]:
    """Every part that is a document, with its place and its path."""
    system = [(_SYSTEM, request.system_instruction)] if request.system_instruction else []
    for index, content in chain(enumerate(request.contents), system):
        for place, part in enumerate(content.parts):
            kind = "file_data" if part.file_data else "inline_data" if part.inline_data else ""
            if kind and not part.thought:
                path = "system_instruction" if index == _SYSTEM else f"contents[{index}]"
                yield (index, place), f"{path}.parts[{place}].{kind}", part


def _replaced(content: Content, index: int, texts: Mapping[Place, str]) -> Content:
    parts = tuple(
        part.model_copy(update={"text": texts[index, place], "inline_data": None, "file_data": None})
        if (index, place) in texts
        else part
        for place, part in enumerate(content.parts)
    )
    return content.model_copy(update={"parts": parts})
