"""generateContent and streamGenerateContent: the journey of a request, from its bytes to its last token."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from engine.api.engine import Engine
from engine.api.events import Event, RequestFinished
from engine.api.requests import Request as EngineRequest
from engine.api.requests import Thinking
from server.convert.chat_tokenizer import ChatTokenizer
from server.convert.prompt import Conversation, document_tokens, prompt_within
from server.convert.sampling import answer_syntax, capped, sampling_params
from server.convert.thinking import with_open_thought
from server.convert.tools import Tools
from server.errors import DeadlineExceeded, InvalidArgument, wants_array
from server.grammar.compiler import GrammarCompiler
from server.grammar.response_format import answer_form
from server.grammar.tool_calls import with_answer_header
from server.http.json_body import to_json
from server.http.streaming import JSON_ARRAY, SERVER_SENT_EVENTS, StreamedAnswer, until_hangup
from server.mapper.candidates import Reading
from server.mapper.parts import PartsParser, answer_parser
from server.mapper.stream import Answer
from server.models.registry import Entry
from server.observability.request_record import RequestRecord
from server.routes.reading import ignored_header, read_conversation, signer_of, timeout_of
from server.wire.generation import GenerationConfig
from server.wire.requests import GenerateContentRequest


@dataclass(frozen=True, slots=True)
class Call:
    """A request that is ready for its engine, and the answer to be filled."""

    engine: Engine
    request: EngineRequest
    answer: Answer
    record: RequestRecord

    async def events(self) -> AsyncGenerator[Event, None]:
        """The engine's events. However the reader leaves, the engine stops working on the request."""
        done = False
        source = self.engine.submit(self.request)
        try:
            async for event in source:
                done = isinstance(event, RequestFinished)
                self.record.observe(event)
                yield event
        finally:
            if not done:
                self.engine.cancel(self.request.id)


async def generate_content(request: Request, entry: Entry) -> Response:
    """POST models/{model}:generateContent"""
    call = await read_call(request, entry)
    answer = await until_hangup(request.receive, call.answer.whole(call.events()))
    return Response(to_json(answer), media_type="application/json", headers=ignored_header(call.record))


async def stream_generate_content(request: Request, entry: Entry) -> Response:
    """POST models/{model}:streamGenerateContent, as server-sent events or as one JSON array"""
    call = await read_call(request, entry)
    framing = JSON_ARRAY if wants_array(request) else SERVER_SENT_EVENTS
    keepalive = request.app.state.settings.keepalive_seconds
    chunks = call.answer.chunks(call.events())
    return StreamedAnswer(chunks, framing, keepalive, call.record, ignored_header(call.record))


async def read_call(request: Request, entry: Entry) -> Call:
    """Check, convert and tokenize a request. Raises ``ApiError`` for what the client must change."""
    deadline = time.monotonic() + timeout_of(request, entry)
    record: RequestRecord = request.state.record
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            asked = await read_conversation(request, entry, GenerateContentRequest)
            config, chat = asked.config, asked.chat
            tokenizer, info = entry.tokenizer, entry.engine.describe()
            record.ignored += capped(config, entry.spec, info)
            grammar = await until_hangup(request.receive, _grammar(request, config, chat, tokenizer))
            prompt = await until_hangup(request.receive, prompt_within(info.max_context, chat, tokenizer))
            from_documents = await until_hangup(request.receive, document_tokens(len(prompt), chat, tokenizer))
    except TimeoutError:
        raise DeadlineExceeded("The deadline passed while the input was read.") from None
    thinking = with_open_thought(chat.thinking, prompt, tokenizer)
    sampling = sampling_params(config, entry.spec, info, tokenizer.end_ids, len(prompt))
    engine_request = EngineRequest(
        id=secrets.token_urlsafe(16),
        prompt=tuple(prompt),
        sampling=answer_syntax(sampling, tokenizer, chat.tools is not None, thinking, grammar),
        candidates=config.candidate_count or 1,
        salt=chat.owner,
        deadline=deadline,
    )
    candidates = engine_request.candidates
    parser = _parser(chat.tools, tokenizer, thinking, constrained=grammar is not None)
    reading = Reading(parser, _shows_thoughts(config), signer_of(request))
    answer = Answer(
        engine_request.id, entry.name, len(prompt), candidates, tokenizer.token_text, reading, from_documents
    )
    return Call(entry.engine, engine_request, answer, record)


async def _grammar(
    request: Request, config: GenerationConfig, chat: Conversation, tokenizer: ChatTokenizer
) -> str | None:
    """What the answer must follow: the caller's schema, or the syntax of calls. Raises ``ApiError``."""
    compiler: GrammarCompiler = request.app.state.grammars
    owner = request.state.identity
    if chat.tools is None:
        grammar = await compiler.answer(config, owner)
        return grammar and with_answer_header(grammar, tokenizer.family, tokenizer.atom_ids)
    form = answer_form(config)
    if form is not None:
        field = "generation_config.response_mime_type"
        raise InvalidArgument.at(
            field, f"Function calling with a response mime type: '{form.mime_type}' is unsupported"
        )
    return await compiler.calls(chat.tools, tokenizer.family, tokenizer.atom_ids, owner)


def _parser(
    tools: Tools | None, tokenizer: ChatTokenizer, thinking: Thinking | None, *, constrained: bool
) -> Callable[[], PartsParser] | None:
    """What takes the answer's text apart; None where it is text and nothing else."""
    opened = thinking is not None and thinking.open
    return answer_parser(tokenizer.family, tools.for_template() if tools else [], opened, constrained)


def _shows_thoughts(config: GenerationConfig) -> bool:
    return config.thinking_config is not None and config.thinking_config.include_thoughts
