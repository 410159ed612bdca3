"""generateContent and streamGenerateContent: the journey of a request, from its bytes to its last token."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from engine.api.errors import Overloaded
from server.errors import ResourceExhausted
from server.generation.pipeline import Prepared
from server.http.error_response import wants_array
from server.http.json_body import json_response, read_away, to_json
from server.http.query import alt_of
from server.http.streaming import JSON_ARRAY, SERVER_SENT_EVENTS, StreamedAnswer, until_hangup
from server.models.registry import Entry
from server.routes.reading import ignored_header, read_as
from server.services import Services
from server.wire.requests import GenerateContentRequest


async def generate_content(request: Request, services: Services, entry: Entry) -> Response:
    """POST models/{model}:generateContent, as one JSON object or as the only one of server-sent events"""
    prepared = await _prepared(request, services, entry)
    whole = await until_hangup(request.receive, prepared.whole(request.state.record.observe))
    answer, headers = request.state.mask.applied(whole), ignored_header(prepared.ignored)
    if alt_of(request) == "sse":  # as the real service does it
        event = f"{SERVER_SENT_EVENTS.before}{to_json(answer)}{SERVER_SENT_EVENTS.after}"
        return Response(event, headers=headers, media_type=SERVER_SENT_EVENTS.media_type)
    return json_response(answer, headers)


async def stream_generate_content(request: Request, services: Services, entry: Entry) -> Response:
    """POST models/{model}:streamGenerateContent, as server-sent events or as one JSON array"""
    prepared = await _prepared(request, services, entry)
    framing = JSON_ARRAY if wants_array(request) else SERVER_SENT_EVENTS
    record = request.state.record
    return StreamedAnswer(
        request.state.mask.each(prepared.chunks(record.observe)),
        framing,
        services.settings.keepalive_seconds,
        record,
        ignored_header(prepared.ignored),
    )


async def _prepared(request: Request, services: Services, entry: Entry) -> Prepared:
    """The request, ready for its engine. Where the engine's queue is full its body is not waited for."""
    try:
        entry.check_room()
    except Overloaded as full:
        await read_away(request)
        raise ResourceExhausted(str(full), headers={"Connection": "close"}) from None
    return await read_as(GenerateContentRequest, request, services, entry, services.pipeline.prepare, entry.place)
