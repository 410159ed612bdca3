"""countTokens: the tokens that the prompt of a request would have."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from server.http.json_body import json_response
from server.mapper.usage import prompt_details
from server.models.registry import Entry
from server.routes.reading import ignored_header, read_as
from server.services import Services
from server.wire.requests import CountTokensRequest


async def count_tokens(request: Request, services: Services, entry: Entry) -> Response:
    """POST models/{model}:countTokens: equal to the ``promptTokenCount`` of a generation, also beyond the context"""
    total, documents = await read_as(CountTokensRequest, request, services, entry, services.pipeline.count)
    answer = {"totalTokens": total, "promptTokensDetails": prompt_details(total, documents)}
    return json_response(request.state.mask.applied(answer), ignored_header(request.state.record.ignored))
