"""What every method on a model does first: find the model, read the message, refuse what is not served, convert."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from starlette.requests import Request

from engine.api.errors import EngineUnavailable
from server.convert.prompt import Conversation, conversation
from server.errors import InvalidArgument
from server.http.json_body import parse_json, read_body
from server.http.streaming import until_hangup
from server.mapper.thought_signature import Signer
from server.media.documents import NO_DOCUMENTS, DocumentReader, Documents, has_documents
from server.models.registry import Entry, Registry
from server.observability.request_record import RequestRecord
from server.offload.fair import FairSlots
from server.wire.generation import GenerationConfig
from server.wire.message import parse
from server.wire.requests import CountTokensRequest, GenerateContentRequest
from server.wire.support import THINKING, Capabilities, review

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


@dataclass(frozen=True, slots=True)
class Asked:
    """What is left of a request when it has become a conversation: the message itself may be large."""

    config: GenerationConfig
    chat: Conversation


async def read_conversation(
    request: Request, entry: Entry, kind: type[GenerateContentRequest] | type[CountTokensRequest]
) -> Asked:
    """The body as a message of which every field has its effect on this model, and that as the model will see it; what
    has no effect goes on record.

    Raises ``ApiError`` naming every field that is wrong or not served, or a document that cannot be read.
    """
    settings, owner = request.app.state.settings, request.state.identity
    raw = await read_body(request, settings.max_body_bytes, settings.body_stall_seconds)
    request.state.is_large = len(raw) >= LARGE_BYTES
    reopen = signer_of(request).open_signature
    try:
        terms: Capabilities | EngineUnavailable = terms_of(entry)
    except EngineUnavailable as not_loaded:  # what is wrong with the request is told all the same
        terms = not_loaded

    def converted(message: GenerateContentRequest, documents: Documents) -> Asked:
        chat = conversation(message, entry.spec, entry.tokenizer, reopen, documents, owner)
        return Asked(message.generation_config, chat)

    def read() -> tuple[list[str], GenerateContentRequest | Asked]:
        parsed = parse(kind, parse_json(raw))
        if isinstance(terms, EngineUnavailable):
            raise terms
        message, ignored = review(parsed, terms)
        for name in message.models:
            check_same_model(request, name, entry)
        generation = message.as_generation()
        return ignored, generation if has_documents(generation) else converted(generation, NO_DOCUMENTS)

    ignored, found = await until_hangup(request.receive, off_loop(request, read))
    record: RequestRecord = request.state.record
    record.ignored += ignored
    if isinstance(found, Asked):
        return found
    reader: DocumentReader = request.app.state.documents
    documents = await until_hangup(request.receive, reader.read(found, owner))
    request.state.is_large = True
    return await until_hangup(request.receive, off_loop(request, partial(converted, found, documents)))


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


def terms_of(entry: Entry) -> Capabilities:
    """What this model can do and lets pass. Raises ``EngineUnavailable`` while that is not known."""
    thinks = entry.tokenizer.thought_ids is not None
    return Capabilities(frozenset({THINKING} if thinks else ()), frozenset(entry.spec.lenient))


def signer_of(request: Request) -> Signer:
    """Who seals and opens the thought signatures of this caller."""
    return Signer(request.app.state.signature_key, request.state.identity)


def ignored_header(record: RequestRecord) -> dict[str, str]:
    """The header that names the fields of a request that were accepted without effect."""
    return {IGNORED_HEADER: ", ".join(record.ignored)[:MAX_IGNORED_CHARACTERS]} if record.ignored else {}


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
