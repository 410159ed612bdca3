"""A scripted engine behind the real application: tests of the front end say what the engine tells, and when."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from support.tiny import EOS_ID, save_tiny_tokenizer, tiny_tokenizer
from support.waiting import PATIENCE

from engine.api.block_groups import BlockGroup
from engine.api.engine import EngineConfig, EngineState, Health, ModelInfo
from engine.api.errors import EngineError, EngineUnavailable
from engine.api.events import (
    CandidateFinished,
    Delta,
    ErrorKind,
    Event,
    FinishReason,
    RequestError,
    RequestFinished,
    TokenLogprobs,
    TopLogprob,
)
from engine.api.requests import Request
from server.app import create_app
from server.config.models_file import ModelSpec
from server.config.settings import Settings
from server.convert.chat_tokenizer import ChatTokenizer
from server.models.registry import Registry
from server.services import Services

INFO = ModelInfo(
    model_type="llama",
    num_parameters=1,
    dtype="float32",
    device="cpu",
    vocab_size=320,
    max_context=512,
    block_size=16,
    groups=(BlockGroup(64),),
    max_running=4,
    eos_ids=(EOS_ID,),
)


@dataclass(frozen=True, slots=True)
class Pause:
    """The engine is silent for so long; None: until somebody cancels."""

    seconds: float | None = None


Script = Sequence[Event | Pause | Exception]
Answering = Callable[[Request], Script]


def saying(text: str, *, cached: int = 0, reason: FinishReason = FinishReason.STOP) -> Answering:
    """Every candidate says ``text`` (ASCII), one token per character, with log-probabilities if asked for."""

    def script(request: Request) -> Script:
        ids = tiny_tokenizer().encode(text).ids
        events: list[Event] = []
        for candidate in range(request.candidates):
            events += [_delta(request, candidate, token, char) for token, char in zip(ids, text, strict=True)]
            events.append(CandidateFinished(candidate, reason, len(ids)))
        events.append(RequestFinished(len(request.prompt), cached, len(ids) * request.candidates))
        return events

    return script


def failing(kind: ErrorKind, message: str, *before: Event | Pause) -> Answering:
    """The request ends with this error after what stands ``before``."""
    aborted = CandidateFinished(0, FinishReason.ABORTED, 0)
    end = RequestFinished(0, 0, 0, RequestError(kind, message))
    return lambda request: [*before, aborted, end]


def _delta(request: Request, candidate: int, token: int, text: str) -> Delta:
    wanted = request.sampling.logprobs
    if wanted is None:
        return Delta(candidate, (token,), text)
    top = tuple(TopLogprob(token + place, -0.5 - place) for place in range(wanted))
    return Delta(candidate, (token,), text, (TokenLogprobs(-0.5, top),))


@dataclass(slots=True)
class ScriptedEngine:
    """An engine that says what ``answers`` hold, one per request, and ``ok`` when they have run out.

    ``refusal`` is raised by every submit. ``full`` means that its queue is full, ``info`` None that it is still
    loading.
    """

    answers: deque[Answering] = field(default_factory=deque)
    refusal: EngineError | None = None
    full: bool = False
    info: ModelInfo | None = INFO
    requests: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    open: set[str] = field(default_factory=set)

    def describe(self) -> ModelInfo:
        if self.info is None:
            raise EngineUnavailable("The model tiny is loading (40%). Please try again later.")
        return self.info

    async def ready(self) -> ModelInfo:
        while self.info is None:
            await asyncio.sleep(0.01)
        return self.info

    def room(self) -> int:
        return 0 if self.full else 1000

    def submit(self, request: Request) -> AsyncIterator[Event]:
        if self.refusal is not None:
            raise self.refusal
        self.describe()
        self.requests.append(request)
        self.open.add(request.id)
        answering = self.answers.popleft() if self.answers else saying("ok")
        return self._play(request, answering(request))

    async def _play(self, request: Request, script: Script) -> AsyncGenerator[Event, None]:
        try:
            for step in script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, Pause):
                    await (asyncio.Event().wait() if step.seconds is None else asyncio.sleep(step.seconds))
                else:
                    yield step
        finally:
            self.open.discard(request.id)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def health(self) -> Health:
        return Health(EngineState.LOADING if self.info is None else EngineState.READY)

    async def close(self) -> None:
        """Nothing to end."""


@dataclass(slots=True)
class Harness:
    """The real application over scripted engines, and a client of it."""

    client: httpx.AsyncClient
    app: Any
    engine: ScriptedEngine

    @property
    def services(self) -> Services:
        """What the application works with."""
        services: Services = self.app.state.services
        return services

    async def generate(self, body: Any, model: str = "tiny", **options: Any) -> httpx.Response:
        return await self.client.post(f"/v1beta/models/{model}:generateContent", json=body, **options)

    async def stream(self, body: Any, alt: str = "sse", **options: Any) -> httpx.Response:
        query = f"?alt={alt}" if alt else ""
        return await self.client.post(f"/v1beta/models/tiny:streamGenerateContent{query}", json=body, **options)

    async def count(self, body: Any, model: str = "tiny") -> httpx.Response:
        return await self.client.post(f"/v1/models/{model}:countTokens", json=body)


@asynccontextmanager
async def serving(folder: Path, specs: Iterable[ModelSpec] = (), **settings: Any) -> AsyncIterator[Harness]:
    """An application that serves ``tiny`` (or ``specs``) from the tokenizer in ``folder`` with a scripted engine."""
    engine = ScriptedEngine()
    models = list(specs) or [ModelSpec("tiny", str(folder), aliases=("gemini-*",), max_output_tokens=100)]
    registry = Registry(
        models, folder, start_engine=lambda config, name: _started(engine, config), read_tokenizer=ChatTokenizer
    )
    app = create_app(Settings(data_dir=folder, cache_dir=folder, **settings), registry)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=30) as client,
    ):
        async with asyncio.timeout(PATIENCE):
            while not all(entry.health().state is EngineState.READY for entry in registry.required()):
                assert all(entry.health().state is not EngineState.FAILED for entry in registry.required())
                await asyncio.sleep(0.01)
        yield Harness(client, app, engine)


def events_of(body: str) -> list[dict[str, Any]]:
    """The objects of a stream of server-sent events, whose framing must be exact: keep-alives are spaces within an
    event, and an error comes once more after its event, bare."""
    *items, rest = body.split("\n\n")
    assert all(item.startswith("data: ") and "\n" not in item for item in items), items
    events = [json.loads(item.removeprefix("data: ")) for item in items]
    assert (json.loads(rest) if rest else None) == (events[-1] if "error" in events[-1] else None), body
    assert not rest or rest == rest.strip()
    return events


def tokenizer_folder(path: Path) -> Path:
    """A model folder as far as the front end reads it: no weights are in it."""
    save_tiny_tokenizer(path)
    (path / "model.safetensors").touch()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": EOS_ID}))
    return path


def _started(engine: ScriptedEngine, config: EngineConfig) -> ScriptedEngine:
    assert config.path
    return engine


class RawCall:
    """One request to an ASGI app, whose answer is read as it comes and whose client can hang up."""

    def __init__(self, app: Any, path: str, body: Any) -> None:
        raw_path, _, query = path.partition("?")
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._received: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._received.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": raw_path,
            "raw_path": raw_path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self.task = asyncio.create_task(app(scope, self._received.get, self.sent.put))

    async def next(self) -> dict[str, Any]:
        """What the app sends next."""
        return await asyncio.wait_for(self.sent.get(), PATIENCE)

    def hang_up(self) -> None:
        """The client is gone."""
        self._received.put_nowait({"type": "http.disconnect"})

    async def ended(self) -> None:
        """Wait until the app is done with the request."""
        await asyncio.wait_for(self.task, PATIENCE)
