"""GET, LIST, DELETE and download of files; what a file looks like on the wire."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, BinaryIO

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from server.errors import InvalidArgument
from server.http.json_body import json_response
from server.http.middleware.forwarded import HOST, PREFIX
from server.routes.reading import ignored_header
from server.services import Services
from server.storage.files.store import StoredFile
from server.wire.files import DEFAULT_PAGE, MAX_PAGE, ListFilesRequest
from server.wire.message import parse

DOWNLOAD_BYTES = 256 * 1024


async def list_files(request: Request, services: Services, version: str) -> Response:
    """GET files?pageSize&pageToken: the caller's own, newest first"""
    wanted = parse(ListFilesRequest, {name: request.state.query.get(name) for name in ("pageSize", "pageToken")})
    size = int(min(wanted.page_size, MAX_PAGE)) or DEFAULT_PAGE
    files, token = await asyncio.to_thread(services.files.page, request.state.identity, size, wanted.page_token)
    page: dict[str, Any] = {"files": [file_resource(request, version, file) for file in files]} if files else {}
    return _answer(request, page | ({"nextPageToken": token} if token else {}))


async def get_file(request: Request, services: Services, version: str, file_id: str) -> Response:
    """GET files/{id}"""
    file = await asyncio.to_thread(services.files.get, file_id, request.state.identity)
    return _answer(request, file_resource(request, version, file))


async def delete_file(request: Request, services: Services, version: str, file_id: str) -> Response:  # noqa: ARG001
    """DELETE files/{id}"""
    await asyncio.to_thread(services.files.delete, file_id, request.state.identity)
    return _answer(request, {})


async def download_file(request: Request, services: Services, version: str, file_id: str) -> Response:  # noqa: ARG001
    """GET files/{id}:download?alt=media: the bytes"""
    store = services.files
    file = await asyncio.to_thread(store.get, file_id, request.state.identity)
    blob = await asyncio.to_thread(store.open, file)
    # An uploaded file must not become a page of this origin.
    headers = {
        "content-length": str(file.size),
        "content-disposition": "attachment",
        "x-content-type-options": "nosniff",
    }
    answer = StreamingResponse(_pieces(blob), headers=headers)
    answer.raw_headers.append((b"content-type", file.mime_type.encode("ascii")))
    return answer


def file_resource(request: Request, version: str, file: StoredFile) -> dict[str, Any]:
    """A File as the API shows it (wire reference 2.6)."""
    uri = f"{base_url(request)}/{version}/files/{file.id}"
    return {
        "name": f"files/{file.id}",
        **({"displayName": file.display_name} if file.display_name else {}),
        "mimeType": file.mime_type,
        "sizeBytes": str(file.size),
        "createTime": _timestamp(file.created),
        "updateTime": _timestamp(file.updated),
        "expirationTime": _timestamp(file.expires),
        "sha256Hash": base64.b64encode(file.sha256).decode(),
        "uri": uri,
        "downloadUri": f"{uri}:download?alt=media",
        "state": "ACTIVE",
        "source": "UPLOADED",
    }


def base_url(request: Request) -> str:
    """Where the client reaches the API: scheme, host and prefix as it used them."""
    host = request.headers.get("host", "")
    if not HOST.fullmatch(host):
        raise InvalidArgument(f"The Host header is {host[:64]!r}, but must be a name or an address, and perhaps a port")
    return f"{request.url.scheme}://{host}{request.scope['state'][PREFIX]}"


def _answer(request: Request, value: Any) -> Response:
    return json_response(request.state.mask.applied(value), ignored_header(request.state.record.ignored))


async def _pieces(blob: BinaryIO) -> AsyncIterator[bytes]:
    try:
        while piece := await asyncio.to_thread(blob.read, DOWNLOAD_BYTES):
            yield piece
    finally:
        blob.close()


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
