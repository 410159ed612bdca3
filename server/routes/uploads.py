"""POST upload/files: the four ways to send a file (wire reference 2.7).

Resumable uploads are started, continued, queried and ended by ``X-Goog-Upload-Command``; multipart forms,
multipart/related and raw bodies bring a whole file at once. All of them are uploads of the store.
"""

from __future__ import annotations

import asyncio
import mimetypes
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import PurePath
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from server.errors import InvalidArgument, PayloadTooLarge
from server.http.json_body import json_response, parse_json, read_body, received
from server.routes.files import base_url, file_resource
from server.routes.reading import ignored_header
from server.services import Services
from server.storage.files.intake import intake, take_whole
from server.storage.files.multipart import Event, MultipartReader, PartBegins, PartData, PartEnds
from server.storage.files.store import StoredFile
from server.storage.files.upload import NewFile
from server.storage.files.upload_url import UPLOAD_ID, upload_id_of
from server.wire.files import CreateFileRequest, File
from server.wire.message import parse
from server.wire.support import review

MAX_METADATA_BYTES = 64 * 1024
GRANULARITY = 256 * 1024
"""Chunks should be multiples of this; any other size is accepted too."""
LEAST_RATE = 16 * 1024
"""Bytes per second that an upload must reach on average, once it takes longer than other bodies may."""
FORM_OVERHEAD = 1024 * 1024
"""Bytes that a multipart body may have in addition to its file."""

MIME_TYPE = re.compile(
    r"[\w.+-]{1,127}/[\w.+-]{1,127}(?:[ \t]*;[ \t]*[\w.-]{1,64}=(?:[\w.+:/-]{1,128}|\"[\w .+:/-]{0,128}\")){0,8}",
    re.ASCII,
)
_CURLS_OWN = "application/x-www-form-urlencoded"
"""The type that curl sends for any body unless its user sets one."""
_COMMANDS = ("start", "upload", "upload, finalize", "finalize", "query", "cancel")
_PROTOCOLS = {"resumable": "resumable", "multipart": "multipart", "raw": "raw", "media": "raw"}


async def upload_file(request: Request, services: Services, version: str) -> Response:
    """POST upload/{version}/files: start an upload, continue one, or send a whole file"""
    upload_id = upload_id_of(request.scope)
    if upload_id:
        return await _go_on(request, services, version, upload_id)
    query, headers = request.query_params, request.headers
    if UPLOAD_ID in query:
        raise InvalidArgument(f"{UPLOAD_ID} must be given once, and must be the upload_id returned by start")
    protocol = headers.get("x-goog-upload-protocol") or query.get("upload_protocol") or query.get("uploadType")
    if protocol is None and headers.get("content-type", "").startswith("multipart/"):
        protocol = "multipart"
    if protocol is None and "x-goog-upload-command" in headers:
        protocol = "resumable"
    match _PROTOCOLS.get((protocol or "").lower()):
        case "resumable":
            return await _start(request, services, version)
        case "multipart":
            return _final(request, version, await _from_form(request, services))
        case "raw":
            length = headers.get("content-length")  # of a packed body it is not the file's
            size = None if length is None or "content-encoding" in headers else _whole_number("Content-Length", length)
            name, mime_type = headers.get("x-goog-upload-file-name", ""), headers.get("content-type", "")
            new = _new_file(request, File(), name, "" if mime_type == _CURLS_OWN else mime_type, size)
            async with aclosing(_body(request, services)) as pieces:
                return _final(request, version, await take_whole(services.uploads, new, pieces))
        case _:
            raise InvalidArgument(
                f"X-Goog-Upload-Protocol is {(protocol or '')[:64]!r}, but must be resumable, multipart or raw; "
                "or send a form with the part file as multipart/form-data"
            )


# --- Resumable uploads ---------------------------------------------------------------------------


async def _start(request: Request, services: Services, version: str) -> Response:
    command = _command(request)
    if command != "start":
        raise InvalidArgument(
            f"X-Goog-Upload-Command is {command!r}, but this URL starts uploads; "
            "send the others to the URL that start returns in X-Goog-Upload-URL"
        )
    settings = services.settings
    raw = await read_body(request, MAX_METADATA_BYTES, settings.body_stall_seconds, settings.body_seconds)
    metadata = _read_metadata(request, raw)
    size = metadata.size_bytes
    if (declared := request.headers.get("x-goog-upload-header-content-length")) is not None:
        size = _whole_number("X-Goog-Upload-Header-Content-Length", declared)
        if metadata.size_bytes not in (None, size):
            stated = metadata.size_bytes
            raise InvalidArgument.at(
                "file.size_bytes",
                f"* File.size_bytes: {stated} is not what X-Goog-Upload-Header-Content-Length says: {size}",
            )
    name = request.headers.get("x-goog-upload-file-name", "")
    mime_type = request.headers.get("x-goog-upload-header-content-type", "")
    new = _new_file(request, metadata, name, mime_type, size)
    upload_id = await asyncio.to_thread(services.uploads.start, new)
    url = f"{base_url(request)}/upload/{version}/files?{UPLOAD_ID}={upload_id}"
    if mask := request.state.query.get("fields"):
        url += f"&fields={quote(mask)}"  # it is meant for the last answer
    headers = {
        "X-Goog-Upload-URL": url,
        "X-Goog-Upload-Control-URL": url,
        "X-Goog-Upload-Chunk-Granularity": str(GRANULARITY),
        "X-Goog-Upload-Status": "active",
        **ignored_header(request.state.record.ignored),
    }
    return json_response({}, headers)


async def _go_on(request: Request, services: Services, version: str, upload_id: str) -> Response:
    uploads = services.uploads
    command = _command(request)
    if command == "cancel":
        await asyncio.to_thread(uploads.cancel, upload_id)
        return json_response({}, {"X-Goog-Upload-Status": "cancelled"})
    if command == "start":
        raise InvalidArgument("X-Goog-Upload-Command is 'start', but this URL belongs to an upload that was started")
    if command.startswith("upload"):
        stated = request.headers.get("x-goog-upload-offset")
        if stated is None:
            raise InvalidArgument(
                "X-Goog-Upload-Offset is missing: send how many bytes of the file come before this chunk"
            )
        offset = _whole_number("X-Goog-Upload-Offset", stated)
        async with intake(uploads, upload_id, offset) as taking, aclosing(_body(request, services)) as pieces:
            async for piece in pieces:
                await taking.add(piece)
    if command.endswith("finalize"):
        return _final(request, version, await asyncio.to_thread(uploads.finish, upload_id))
    status = await asyncio.to_thread(uploads.status, upload_id)
    if status.file is not None:
        return _final(request, version, status.file)
    return json_response({}, {"X-Goog-Upload-Status": "active", "X-Goog-Upload-Size-Received": str(status.received)})


def _command(request: Request) -> str:
    words = [word.strip().lower() for word in request.headers.get("x-goog-upload-command", "").split(",")]
    command = ", ".join(words)
    if command not in _COMMANDS:
        raise InvalidArgument(f"X-Goog-Upload-Command is {command[:64]!r}, but must be one of: {'; '.join(_COMMANDS)}")
    return command


def _whole_number(header: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise InvalidArgument(f"{header} is {text[:64]!r}, but must be a whole number of bytes, 0 or more")
    return int(text)


# --- Forms ---------------------------------------------------------------------------------------


async def _from_form(request: Request, services: Services) -> StoredFile:
    """Parts of multipart/form-data by their names, parts of multipart/related by their places."""
    length = request.headers.get("content-length", "")
    most = services.files.limits.file_bytes + FORM_OVERHEAD
    if length.isdigit() and int(length) > most:
        raise PayloadTooLarge(f"The body has {length[:20]} bytes; a form with a file has at most {most}.")
    reader = MultipartReader(request.headers.get("content-type", ""))
    metadata = None
    async with aclosing(_events(_body(request, services), reader, most)) as events:
        async for part in events:
            if not isinstance(part, PartBegins):
                continue
            if reader.is_form and part.name not in ("metadata", "file"):
                raise InvalidArgument(
                    f"The form has a part with the name {part.name[:64]!r}; "
                    "it can have metadata (JSON, optional) and file"
                )
            if reader.is_form and part.name == "metadata" and metadata is not None:
                raise InvalidArgument("The form has two parts with the name metadata; send one")
            if part.name == "metadata" if reader.is_form else metadata is None:
                metadata = _read_metadata(request, await _whole_part(events))
                continue
            metadata = metadata or File()
            new = _new_file(request, metadata, part.filename, part.content_type, metadata.size_bytes)
            async with aclosing(_file_bytes(events)) as pieces:
                return await take_whole(services.uploads, new, pieces)
    raise InvalidArgument("The body has no part with the name file; send the bytes of the file in one")


async def _events(body: AsyncGenerator[bytes, None], reader: MultipartReader, most: int) -> AsyncGenerator[Event, None]:
    read = 0
    async with aclosing(body) as pieces:
        async for piece in pieces:
            read += len(piece)
            if read > most:
                raise PayloadTooLarge(f"The body has more than {most} bytes, the most of a form with a file.")
            for event in reader.feed(piece):
                yield event
    reader.close()


async def _whole_part(events: AsyncGenerator[Event, None]) -> bytes:
    data = bytearray()
    async for event in events:
        if isinstance(event, PartEnds):
            break
        if isinstance(event, PartData):
            data += event.data
        if len(data) > MAX_METADATA_BYTES:
            raise InvalidArgument(f"The part metadata has more than {MAX_METADATA_BYTES} bytes")
    return bytes(data)


async def _file_bytes(events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    """The bytes of the part that has begun; it ends when the whole body has been read and nothing else came."""
    async for event in events:
        if isinstance(event, PartBegins):
            raise InvalidArgument("A part comes after the file; send one file, and the part metadata before it")
        if isinstance(event, PartData):
            yield event.data


# --- What all forms share ------------------------------------------------------------------------


def _new_file(request: Request, metadata: File, name: str, mime_type: str, size: int | None) -> NewFile:
    """What is known of a file when its first byte arrives. Raises ``InvalidArgument`` for an invalid type."""
    declared = (
        metadata.mime_type
        or mime_type
        or mimetypes.guess_type(f"file{PurePath(name).suffix}")[0]
        or "application/octet-stream"
    )
    if not MIME_TYPE.fullmatch(declared):
        raise InvalidArgument.at(
            "file.mime_type", f"* File.mime_type: {declared[:64]!r} must be a type and a subtype, such as text/plain"
        )
    return NewFile(request.state.identity, metadata.name, metadata.display_name or name, declared, size)


def _read_metadata(request: Request, raw: bytes) -> File:
    """The client's metadata of its file, wrapped in ``file`` or bare. Raises ``InvalidArgument``."""
    payload = parse_json(raw)
    if isinstance(payload, dict) and payload and "file" not in payload:
        payload = {"file": payload}
    message, ignored = review(parse(CreateFileRequest, payload))
    request.state.record.ignored += ignored
    return message.file


def _body(request: Request, services: Services) -> AsyncGenerator[bytes, None]:
    settings = services.settings
    return received(request, settings.body_stall_seconds, settings.body_seconds, LEAST_RATE)


def _final(request: Request, version: str, file: StoredFile) -> Response:
    """The answer of an upload that is complete."""
    headers = {
        "X-Goog-Upload-Status": "final",
        "X-Goog-Upload-Size-Received": str(file.size),
        **ignored_header(request.state.record.ignored),
    }
    return json_response(request.state.mask.applied({"file": file_resource(request, version, file)}), headers)
