"""Prepares a request: what its engine computes, and how the answer is read.

Data goes one way: message → conversation → grammar and prompt → sampling → the engine's request → the answer. What an
answer needs from its request is carried in `Prepared`.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from engine.api.engine import Engine
from engine.api.errors import EngineUnavailable
from engine.api.events import Event, RequestFinished
from engine.api.requests import Request
from server.convert.chat_tokenizer import ChatTokenizer
from server.convert.prompt import Conversation, conversation, prompt_tokens, prompt_within
from server.convert.sampling import answer_syntax, capped, sampling_params
from server.convert.thinking import with_open_thought
from server.convert.turns import check_counts
from server.errors import DeadlineExceeded, InvalidArgument
from server.grammar.compiler import AnswerGrammar, GrammarCompiler
from server.grammar.tool_calls import with_answer_header
from server.mapper.candidates import Reading
from server.mapper.logprobs import TokenText
from server.mapper.parts import answer_parser
from server.mapper.stream import Answer
from server.mapper.thought_signature import Signer
from server.media.documents import DocumentReader, has_documents
from server.models.registry import Entry, Registry
from server.offload.large_requests import LargeRequests
from server.wire.generation import GenerationConfig
from server.wire.requests import CountTokensRequest, GenerateContentRequest
from server.wire.support import THINKING, Capabilities, review

_COLLECTION = re.compile(r"^(?:projects/[^/]+/locations/[^/]+/)?(?:publishers/[^/]+/)?models/")
"""What stands before the name of a model in a body, also as Vertex AI has it."""
LARGE_BYTES = 65_536
"""Requests of this size and above are read in a thread: the largest would block all others for seconds."""


class Incoming:
    """A request before it is read: its bytes, and how they become a message. It can be read once and then keeps
    nothing: bodies are as large as 20 MiB, and many may wait for their prompts."""

    def __init__(self, raw: bytes, parse: Callable[[bytes], GenerateContentRequest | CountTokensRequest]) -> None:
        self.is_large = len(raw) >= LARGE_BYTES
        self._raw = raw
        self._parse = parse

    def read(self) -> GenerateContentRequest | CountTokensRequest:
        """The message. Raises ``ApiError``."""
        raw, self._raw = self._raw, b""
        return self._parse(raw)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request; ``identity`` is "" where there are no API keys.

    ``ignored`` takes the JSON paths of fields without effect as soon as they are known: they are recorded even if the
    request fails later.
    """

    identity: str = ""
    ignored: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that is ready for its engine, and what its answer needs.

    ``model`` is the resolved name, never an alias. ``document_tokens`` are among those of the prompt. ``ignored`` are
    the JSON paths of the fields that have no effect.
    """

    engine: Engine
    request: Request
    model: str
    token_text: TokenText
    reading: Reading
    document_tokens: int
    ignored: tuple[str, ...]

    async def whole(self, observe: Callable[[Event], None]) -> dict[str, Any]:
        """The complete response. ``observe`` gets each event of the engine. Raises ``ApiError``."""
        return await self._answer().whole(self._events(observe))

    def chunks(self, observe: Callable[[Event], None]) -> AsyncGenerator[dict[str, Any], None]:
        """Responses that each hold what is new. Raises as `whole` does."""
        return self._answer().chunks(self._events(observe))

    def _answer(self) -> Answer:
        return Answer(
            self.request.id,
            self.model,
            len(self.request.prompt),
            self.request.candidates,
            self.token_text,
            self.reading,
            self.document_tokens,
        )

    async def _events(self, observe: Callable[[Event], None]) -> AsyncGenerator[Event, None]:
        """The engine's events. However the reader stops, the engine stops working on the request."""
        done = False
        source = self.engine.submit(self.request)
        try:
            async for event in source:
                done = isinstance(event, RequestFinished)
                observe(event)
                yield event
        finally:
            if not done:
                self.engine.cancel(self.request.id)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is kept of a message once it is a conversation: the message itself may be large."""

    config: GenerationConfig
    chat: Conversation
    tokenizer: ChatTokenizer
    signer: Signer


class Pipeline:
    """Prepares the requests of one server. Large ones are read one at a time, and callers take turns."""

    def __init__(
        self, registry: Registry, documents: DocumentReader, grammars: GrammarCompiler, signature_key: bytes
    ) -> None:
        self._registry = registry
        self._documents = documents
        self._grammars = grammars
        self._signature_key = signature_key
        self._large_requests = LargeRequests()
        self._turn = asyncio.Lock()
        """Of the many requests that come at once, one is read in each turn of the event loop: between them connections
        are accepted, tokens sent and requests turned away."""

    async def prepare(self, message: Incoming, entry: Entry, caller: Caller, deadline: float) -> Prepared:
        """Check, convert and tokenize a request for the model of ``entry``.

        ``deadline`` is an instant of ``time.monotonic()``, for the preparation and the answer. Raises ``ApiError`` for
        what the caller must change, and ``EngineUnavailable``.
        """
        async with time_limit(deadline):
            asked = await self._read(message, entry, caller)
            config, chat, tokenizer = asked.config, asked.chat, asked.tokenizer
            info = entry.engine.describe()
            caller.ignored.extend(capped(config, entry.spec, info))
            grammar = await self._grammar(config, chat, tokenizer, entry.spec.strict_schemas)
            caller.ignored.extend(grammar.ignored if grammar else ())
            prompt, document_tokens = await prompt_within(info, chat, tokenizer)
            resumed = await tokenizer.resume_points(chat.chat, prompt, owner=chat.owner) if info.state_bytes else ()
        thinking = with_open_thought(chat.thinking, prompt, tokenizer)
        sampling = sampling_params(config, entry.spec, info, tokenizer.end_ids, len(prompt))
        text, starts = (grammar.text, grammar.call_starts) if grammar else (None, ())
        request = Request(
            id=secrets.token_urlsafe(16),
            prompt=tuple(prompt),
            sampling=answer_syntax(sampling, tokenizer, chat.tools is not None, thinking, text, starts),
            candidates=config.candidate_count or 1,
            salt=chat.owner,
            deadline=deadline,
            resume_points=resumed,
        )
        new_parser = answer_parser(
            tokenizer.family,
            chat.tools.for_template() if chat.tools else [],
            open_thought=thinking is not None and thinking.open,
            constrained=grammar is not None and grammar.has_form,
            call_starts=starts,
        )
        shows_thoughts = config.thinking_config is not None and config.thinking_config.include_thoughts
        check = partial(self._grammars.remark, grammar, owner=chat.owner) if grammar and grammar.has_checks else None
        reading = Reading(new_parser, shows_thoughts, asked.signer, check)
        return Prepared(
            entry.engine, request, entry.name, tokenizer.token_text, reading, document_tokens, tuple(caller.ignored)
        )

    async def count(self, message: Incoming, entry: Entry, caller: Caller, deadline: float) -> tuple[int, int]:
        """The tokens of the prompt, also beyond the context, and how many of them are documents'. Raises as `prepare`
        does."""
        async with time_limit(deadline):
            asked = await self._read(message, entry, caller, counting=True)
            return await prompt_tokens(entry.engine.describe().max_context, asked.chat, asked.tokenizer)

    async def _read(self, incoming: Incoming, entry: Entry, caller: Caller, counting: bool = False) -> _Asked:
        """The message as the model will see it, with only the fields that have an effect on this model; with
        ``counting`` it need not be one that can be answered.

        Raises ``ApiError`` naming every field that is wrong or not served, or a document that cannot be read.
        """
        signer = Signer(self._signature_key, caller.identity)
        try:
            loaded: ChatTokenizer | EngineUnavailable = entry.tokenizer
        except EngineUnavailable as not_loaded:  # problems of the request are reported anyway
            loaded = not_loaded

        def asked(
            message: GenerateContentRequest, tokenizer: ChatTokenizer, emptied: GenerateContentRequest | None = None
        ) -> _Asked:
            reopen = signer.open_signature
            chat = conversation(message, entry.spec, tokenizer, reopen, emptied, caller.identity, counting)
            return _Asked(message.generation_config, chat, tokenizer, signer)

        def read() -> tuple[list[str], GenerateContentRequest | _Asked]:
            parsed = incoming.read()
            if isinstance(loaded, EngineUnavailable):
                raise loaded
            abilities = frozenset({THINKING} if loaded.thought_ids is not None else ())
            message, ignored = review(parsed, Capabilities(abilities, frozenset(entry.spec.lenient)))
            for name in filter(None, message.models):
                if self._registry.resolve(_COLLECTION.sub("", name)) is not entry:
                    description = f"{name[:64]!r} is not the model of the path, {entry.name!r}"
                    raise InvalidArgument.at("model", f"* GenerateContentRequest.model: {description}")
            generation = message.as_generation()
            return ignored, generation if has_documents(generation) else asked(generation, loaded)

        if incoming.is_large:
            ignored, found = await self._large_requests.run(caller.identity, read)
        else:
            async with self._turn:
                await asyncio.sleep(0)
                ignored, found = read()
        caller.ignored.extend(ignored)
        if isinstance(found, _Asked):
            return found
        message, tokenizer = found, entry.tokenizer
        check_counts(message)
        documents = await self._documents.read(message, caller.identity)
        return await self._large_requests.run(
            caller.identity,
            lambda: asked(documents.within(message), tokenizer, documents.within(message, emptied=True)),
        )

    async def _grammar(
        self, config: GenerationConfig, chat: Conversation, tokenizer: ChatTokenizer, strict: bool
    ) -> AnswerGrammar | None:
        """What the answer must follow: the caller's schema, or the syntax of calls. Raises ``ApiError``."""
        family, atom_ids = tokenizer.family, tokenizer.atom_ids
        if chat.tools is not None:
            return await self._grammars.calls(chat.tools, family, atom_ids, chat.owner, config, strict)
        grammar = await self._grammars.answer(config, chat.owner, strict)
        return grammar and replace(grammar, text=with_answer_header(grammar.text, family, atom_ids))


@asynccontextmanager
async def time_limit(deadline: float) -> AsyncIterator[None]:
    """Raises ``DeadlineExceeded`` where a request is still being read at ``deadline`` (of ``time.monotonic()``)."""
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            yield
    except TimeoutError:
        raise DeadlineExceeded("The deadline passed while the input was read.") from None
