"""countTokens: the number of tokens that the prompt of a request would have."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from server.body import to_json
from server.convert.prompt import conversation, prompt_ids
from server.mapper.usage import text_tokens
from server.registry import Entry
from server.routes.reading import check_same_model, ignored_header, read_message, signer_of
from server.streaming import until_hangup
from server.wire.requests import CountTokensRequest


async def count_tokens(request: Request, entry: Entry) -> Response:
    """POST models/{model}:countTokens: equal to the ``promptTokenCount`` of a generation, also beyond the context"""
    wire = await read_message(request, CountTokensRequest, entry)
    generation = wire.as_generation()
    for name in (wire.model, generation.model):
        check_same_model(request, name, entry)
    reopen = signer_of(request).open_signature
    chat = conversation(generation, entry.spec, entry.tokenizer, reopen)
    ids = await until_hangup(request.receive, prompt_ids(chat, entry.tokenizer))
    answer = {"totalTokens": len(ids), "promptTokensDetails": text_tokens(len(ids))}
    return Response(to_json(answer), media_type="application/json", headers=ignored_header(request.state.record))
