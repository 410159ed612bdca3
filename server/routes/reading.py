"""What every method on a model does first: find the model, read the message, refuse what is not served."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from starlette.requests import Request

from server.body import parse_json, read_body
from server.convert.documents import DocumentReader, Documents
from server.errors import InvalidArgument
from server.fair import FairSlots
from server.mapper.signature import Signer
from server.observe import RequestRecord
from server.registry import Entry, Registry
from server.wire.message import M, parse
from server.wire.requests import GenerateContentRequest
from server.wire.support import THINKING, Terms, review

LARGE_BYTES = 65_536
"""Bodies from here on are read in a thread: the largest would hold up everybody else for seconds."""
T = TypeVar("T")

IGNORED_HEADER = "x-castor-ignored"
MAX_IGNORED_CHARACTERS = 2000
MAX_TIMEOUT = 86_400.0


def find_model(request: Request, name: str) -> Entry:
    """The entry with this name, alias or pattern; ``models/x`` and ``x`` mean the same. Raises ``ModelNotFound``."""
    registry: Registry = request.app.state.registry
    return registry.resolve(name.removeprefix("models/"))


def check_same_model(request: Request, name: str, entry: Entry) -> None:
    """A model that is named in the body again must be the one of the path. Raises ``InvalidArgument``."""
    if name and find_model(request, name) is not entry:
        raise InvalidArgument.at(
            "model", f"* GenerateContentRequest.model: {name[:64]!r} is not the model of the path, {entry.name!r}"
        )


async def read_message(request: Request, kind: type[M], entry: Entry) -> M:
    """The body as a message of which every field has its effect on this model; what has none goes on record.

    Raises ``ApiError`` naming every field that is wrong or not served.
    """
    settings = request.app.state.settings
    raw = await read_body(request, settings.max_body_bytes, settings.body_stall_seconds)
    request.state.is_large = len(raw) >= LARGE_BYTES
    message, ignored = await off_loop(request, partial(_reviewed, kind, raw, terms_of(entry)))
    record: RequestRecord = request.state.record
    record.ignored += ignored
    return message


async def off_loop(request: Request, work: Callable[[], T]) -> T:
    """What ``work`` returns. For a large request it runs in a thread, and one request at a time does: several threads
    would keep the event loop waiting for the interpreter's lock. Callers take turns. Raises ``ResourceExhausted``.
    """
    if not request.state.is_large:
        return work()
    slots: FairSlots = request.app.state.large_requests
    async with slots.of(request.state.identity):
        working = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            return await asyncio.shield(working)
        finally:
            await asyncio.wait([working])  # a thread cannot be cancelled, so its place is not free before


async def read_documents(request: Request, message: GenerateContentRequest) -> Documents:
    """The documents that a message names or holds, as texts. Raises ``ApiError`` for one that cannot be read."""
    reader: DocumentReader = request.app.state.documents
    documents = await reader.read(message, request.state.identity)
    request.state.is_large = request.state.is_large or bool(documents)
    return documents


def terms_of(entry: Entry) -> Terms:
    """What this model can do and lets pass. Raises ``EngineUnavailable`` while that is not known."""
    thinks = entry.tokenizer.thought_ids is not None
    return Terms(frozenset({THINKING} if thinks else ()), frozenset(entry.spec.lenient))


def signer_of(request: Request) -> Signer:
    """Who seals and opens the thought signatures of this caller."""
    return Signer(request.app.state.signature_key, request.state.identity)


def ignored_header(record: RequestRecord) -> dict[str, str]:
    """The header that names the fields of a request that were accepted without effect."""
    return {IGNORED_HEADER: ", ".join(record.ignored)[:MAX_IGNORED_CHARACTERS]} if record.ignored else {}


def _reviewed(kind: type[M], raw: bytes, terms: Terms) -> tuple[M, list[str]]:
    return review(parse(kind, parse_json(raw)), terms)


def timeout_of(request: Request, entry: Entry) -> float:
    """Seconds that the answer may take: what the client says, else the limit of the model's entry."""
    text = request.headers.get("x-server-timeout")
    if text is None:
        return entry.spec.request_timeout
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT:
        raise InvalidArgument(f"X-Server-Timeout is {text[:64]!r}, but must be seconds, above 0 and at most 86400")
    return seconds
