"""countTokens: the number of tokens that the prompt of a request would have."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from server.convert.prompt import document_tokens, prompt_tokens
from server.errors import DeadlineExceeded
from server.http.json_body import to_json
from server.http.streaming import until_hangup
from server.mapper.usage import prompt_details
from server.models.registry import Entry
from server.routes.reading import ignored_header, read_conversation, timeout_of
from server.wire.requests import CountTokensRequest


async def count_tokens(request: Request, entry: Entry) -> Response:
    """POST models/{model}:countTokens: equal to the ``promptTokenCount`` of a generation, also beyond the context"""
    try:
        async with asyncio.timeout(timeout_of(request, entry)):
            total, documents = await _count(request, entry)
    except TimeoutError:
        raise DeadlineExceeded("The deadline passed while the input was read.") from None
    answer = {"totalTokens": total, "promptTokensDetails": prompt_details(total, documents)}
    return Response(to_json(answer), media_type="application/json", headers=ignored_header(request.state.record))


async def _count(request: Request, entry: Entry) -> tuple[int, int]:
    """The tokens of the prompt, and how many of them are documents'."""
    asked = await read_conversation(request, entry, CountTokensRequest)
    context = entry.engine.describe().max_context
    total = await until_hangup(request.receive, prompt_tokens(context, asked.chat, entry.tokenizer))
    documents = await until_hangup(request.receive, document_tokens(total, asked.chat, entry.tokenizer))
    return total, documents
