"""countTokens: the number of tokens that the prompt of a request would have."""

from __future__ import annotations

import asyncio
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from server.body import to_json
from server.convert.prompt import conversation, document_tokens, prompt_tokens
from server.errors import DeadlineExceeded
from server.mapper.usage import prompt_details
from server.registry import Entry
from server.routes.reading import (
    check_same_model,
    ignored_header,
    off_loop,
    read_documents,
    read_message,
    signer_of,
    timeout_of,
)
from server.streaming import until_hangup
from server.wire.requests import CountTokensRequest, GenerateContentRequest


async def count_tokens(request: Request, entry: Entry) -> Response:
    """POST models/{model}:countTokens: equal to the ``promptTokenCount`` of a generation, also beyond the context"""
    wire = await read_message(request, CountTokensRequest, entry)
    generation = wire.as_generation()
    for name in (wire.model, generation.model):
        check_same_model(request, name, entry)
    try:
        async with asyncio.timeout(timeout_of(request, entry)):
            total, documents = await until_hangup(request.receive, _count(request, generation, entry))
    except TimeoutError:
        raise DeadlineExceeded("The deadline passed while the input was read.") from None
    answer = {"totalTokens": total, "promptTokensDetails": prompt_details(total, documents)}
    return Response(to_json(answer), media_type="application/json", headers=ignored_header(request.state.record))


async def _count(request: Request, generation: GenerateContentRequest, entry: Entry) -> tuple[int, int]:
    """The tokens of the prompt, and how many of them are documents'."""
    documents = await read_documents(request, generation)
    tokenizer, reopen, owner = entry.tokenizer, signer_of(request).open_signature, request.state.identity
    converted = partial(conversation, generation, entry.spec, tokenizer, reopen, documents, owner)
    chat = await off_loop(request, converted)
    total = await prompt_tokens(entry.engine.describe().max_context, chat, tokenizer)
    return total, await document_tokens(total, chat, tokenizer)
