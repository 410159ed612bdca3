"""The models that this server offers: names and aliases to entries, and the loading and unloading of each.

An entry has no engine at first. Starting it finds the prepared weights, starts the engine and loads the tokenizer
beside it; until then, callers get its loading progress.

A model that could not be loaded is tried again at the next request for it, so an operator who has repaired a folder
need not restart the server. That holds for every reason: a model may be refused because only half of it has been
copied, and which failures are temporary cannot be known. In between the entry rests, and callers get the failure: for
``REST_SECONDS`` or as long as the failed attempt took, whichever is more, so that constant requests keep a machine
loading at most half of the time. An engine that has been ready is restarted by its own supervisor, with or without
requests, and concerns this module only if its model is refused then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from engine.api.engine import Engine, EngineConfig, EngineState, Health, ModelInfo
from engine.api.errors import EngineUnavailable, Overloaded, SourceError
from engine.api.events import Event
from engine.api.requests import Request
from engine.weights.sources import FolderSource, prepare, prepared_folder
from server.config.models_file import ModelSpec, is_glob, literal_length
from server.errors import ModelNotFound
from server.models.own_defaults import with_own_defaults
from server.observability.logs import log

if TYPE_CHECKING:
    from server.convert.chat_tokenizer import ChatTokenizer

REST_SECONDS = 10.0
TOKENIZER_SECONDS = 300.0
"""The limit of reading a tokenizer: seconds are usual, and files can be crafted that never finish."""

EngineFactory = Callable[[EngineConfig, str], Engine]
"""Starts the engine of the entry with this name; returns at once, ``health()`` shows the loading progress."""

TokenizerFactory = Callable[[Path], "ChatTokenizer"]


def start_process(config: EngineConfig, name: str) -> Engine:
    """An engine in a process of its own."""
    from engine.process.client import ProcessEngine

    engine = ProcessEngine(config, name=name)
    engine.start()
    return engine


def load_tokenizer(folder: Path) -> ChatTokenizer:
    """The chat tokenizer of a prepared folder; takes seconds, because it imports the library behind it."""
    from server.convert.chat_tokenizer import ChatTokenizer

    return ChatTokenizer(folder)


def weights_of(spec: ModelSpec, cache_dir: Path) -> Path:
    """The folder of an entry's prepared weights, checked; fetches nothing. Raises ``SourceError`` saying what to do."""
    source = spec.where()
    if not isinstance(source, FolderSource) and prepared_folder(source, spec.sha256, cache_dir) is None:
        raise SourceError(f"the weights of {spec.name} are not on this machine: run `castor models fetch {spec.name}`")
    return prepare(source, spec.sha256, cache_dir, lambda _stage, _share: None)


class Entry:
    """One served model. Its names come from models.yaml, its abilities from its engine.

    ``spec`` is what models.yaml says, and where it says nothing about sampling, what the model's folder says.
    """

    def __init__(
        self,
        spec: ModelSpec,
        cache_dir: Path,
        start_engine: EngineFactory,
        read_tokenizer: TokenizerFactory,
        rest_seconds: float,
        tokenizer_seconds: float,
    ) -> None:
        prepared = prepared_folder(spec.where(), spec.sha256, cache_dir)
        self.spec = spec if prepared is None else with_own_defaults(spec, prepared)
        self._configured = spec
        self.name = spec.name
        self.aliases = spec.aliases
        self.version = (spec.sha256 or "")[:12] or "local"
        self.engine: Engine = _NoEngine(Health(EngineState.STOPPED, f"{spec.name} is not loaded"))
        self._cache_dir = cache_dir
        self._start_engine = start_engine
        self._read_tokenizer = read_tokenizer
        self._rest_seconds = rest_seconds
        self._tokenizer_seconds = tokenizer_seconds
        self._rests_until = 0.0
        self._tokenizer: ChatTokenizer | None = None
        self._tokenizer_error = ""
        self._loading: asyncio.Task[None] | None = None
        self._reader: Thread | None = None
        self._in_preparation = 0
        self._closed = False

    @property
    def tokenizer(self) -> ChatTokenizer:
        """The model's tokenizer. Raises ``EngineUnavailable`` until it is loaded; asking starts a sleeping entry."""
        self.start()
        if self._tokenizer is None:
            health = self.health()
            if health.state is EngineState.LOADING:
                raise EngineUnavailable(
                    f"The model {self.name} is loading ({health.progress:.0%}). Please try again later."
                )
            raise EngineUnavailable(f"The model {self.name} is not available: {health.detail or health.state}.")
        return self._tokenizer

    def start(self) -> None:
        """Start to load, unless that is done, under way or failed a moment ago; returns at once.

        Weights that are missing are looked for each time, since that costs nothing.
        """
        loaded = self._tokenizer is not None and self.engine.health().state is not EngineState.FAILED
        loading = self._loading is not None and not self._loading.done()
        reading = self._reader is not None and self._reader.is_alive()  # perhaps for ever: one is enough
        if loaded or loading or reading or self._closed or time.monotonic() < self._rests_until:
            return
        self._tokenizer_error = ""
        try:
            folder = weights_of(self.spec, self._cache_dir)
        except SourceError as error:
            self.engine = _NoEngine(Health(EngineState.FAILED, str(error)))
            return
        self.spec = with_own_defaults(self._configured, folder)
        self._tokenizer = None  # not closed: a request may be rendering with it, and its threads end with it
        self.engine = self._start_engine(engine_config(self.spec, folder, self._cache_dir), self.name)
        self._loading = asyncio.create_task(self._load(folder))

    def health(self) -> Health:
        """The engine's health; an entry is ready only when its tokenizer is loaded too."""
        health = self.engine.health()
        if self._tokenizer_error:
            return replace(health, state=EngineState.FAILED, detail=self._tokenizer_error)
        if health.state is EngineState.READY and self._tokenizer is None:
            return replace(health, state=EngineState.LOADING, detail="loading the tokenizer")
        return health

    def check_room(self) -> None:
        """Raises ``Overloaded`` where the engine's queue is full, requests that are being prepared for it included.

        What an engine that is not ready answers is found out later, beside the problems of the request.
        """
        is_ready = self.engine.health().state is EngineState.READY
        if is_ready and self._in_preparation >= self.engine.room():
            raise Overloaded(f"The queue of {self.name} is full: try again later.")

    @contextmanager
    def place(self) -> Iterator[None]:
        """Within the block a request is prepared and has a place in the engine's queue. Raises as `check_room`."""
        self.check_room()
        self._in_preparation += 1
        try:
            yield
        finally:
            self._in_preparation -= 1

    async def close(self) -> None:
        """Unload; requests in flight get their terminal error. The entry does not start again."""
        self._closed = True
        if self._loading is not None:
            self._loading.cancel()
        await self.engine.close()
        if self._tokenizer is not None:
            await self._tokenizer.close()

    async def _load(self, folder: Path) -> None:
        """One attempt. Engine and tokenizer are read from the same files, so both are used or neither is."""
        began = time.monotonic()
        # Whatever libraries raise over an operator's files is a failure to report, even a panic of their Rust code.
        (read,) = await asyncio.gather(self._read(folder), return_exceptions=True)
        if isinstance(read, BaseException):
            self._tokenizer_error = f"the tokenizer of {self.name} cannot be loaded: {read}"
            log.error("tokenizer not loaded", model=self.name, exc_info=read)
            await self.engine.close()
        else:
            self._tokenizer = read
            try:
                await self.engine.ready()
                return
            except EngineUnavailable:
                log.error("engine not loaded", model=self.name, reason=self.engine.health().detail)
        ended = time.monotonic()
        self._rests_until = ended + max(self._rest_seconds, ended - began)

    async def _read(self, folder: Path) -> ChatTokenizer:
        """The tokenizer, from a thread that the end of the process does not wait for."""
        outcome: Future[ChatTokenizer] = Future()
        outcome.set_running_or_notify_cancel()

        def read() -> None:
            try:
                outcome.set_result(self._read_tokenizer(folder))
            except BaseException as failure:  # noqa: BLE001 - raised again where it is awaited
                outcome.set_exception(failure)

        self._reader = Thread(target=read, name=f"tokenizer {self.name}", daemon=True)
        self._reader.start()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(outcome), self._tokenizer_seconds)
        except TimeoutError:
            raise TimeoutError(f"it was not read within {self._tokenizer_seconds:g} s") from None


class Registry:
    """All entries of a server, in file order."""

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        cache_dir: Path,
        *,
        start_engine: EngineFactory = start_process,
        read_tokenizer: TokenizerFactory = load_tokenizer,
        rest_seconds: float = REST_SECONDS,
        tokenizer_seconds: float = TOKENIZER_SECONDS,
    ) -> None:
        self._entries = {
            spec.name: Entry(spec, cache_dir, start_engine, read_tokenizer, rest_seconds, tokenizer_seconds)
            for spec in specs
        }
        aliases = [(alias, entry) for entry in self._entries.values() for alias in entry.aliases]
        self._exact = {alias: entry for alias, entry in aliases if not is_glob(alias)}
        globs = [(alias, entry) for alias, entry in aliases if is_glob(alias)]
        # The longest wins, so that "gemini-2.5-*" beside "gemini-*" does what it says in any order of the file.
        self._globs = sorted(globs, key=lambda glob: -literal_length(glob[0]))

    def entries(self) -> list[Entry]:
        """The entries in file order; each has one real name."""
        return list(self._entries.values())

    def resolve(self, name: str) -> Entry:
        """The entry with this name, else with this alias, else with the matching pattern that has the most literal
        characters, of equals the first in the file. Raises ``ModelNotFound``."""
        found = self._entries.get(name) or self._exact.get(name)
        if found is not None:
            return found
        for pattern, entry in self._globs:
            if fnmatchcase(name, pattern):
                return entry
        raise ModelNotFound(name)

    def start(self) -> None:
        """Start to load every entry that is marked ``load: start``, unless that has been done."""
        for entry in self.required():
            entry.start()

    def required(self) -> list[Entry]:
        """The entries that must be loaded for the server to be ready."""
        return [entry for entry in self._entries.values() if entry.spec.load == "start"]

    async def close(self) -> None:
        """Unload everything; a second call does nothing."""
        await asyncio.gather(*(entry.close() for entry in self._entries.values()))


def engine_config(spec: ModelSpec, folder: Path, cache_dir: Path) -> EngineConfig:
    """The configuration that the engine of an entry is started with."""
    return EngineConfig(
        path=str(folder),
        dtype=spec.dtype,
        device=spec.device,
        max_context=spec.max_context,
        kv_memory=spec.kv_memory,
        kv_dtype=spec.kv_dtype,
        cuda_graphs=spec.cuda_graphs,
        max_running=spec.max_running,
        max_waiting=spec.max_waiting,
        native=spec.native,
        quantize=spec.quantize,
        cache_dir=str(cache_dir),
    )


class _NoEngine:
    """Takes the place of an engine that has not been or cannot be started: its health never changes, it serves
    nothing."""

    def __init__(self, health: Health) -> None:
        self._health = health

    def describe(self) -> ModelInfo:
        raise EngineUnavailable(self._health.detail)

    async def ready(self) -> ModelInfo:
        raise EngineUnavailable(self._health.detail)

    def room(self) -> int:
        return 0

    def submit(self, request: Request) -> AsyncIterator[Event]:  # noqa: ARG002 - the protocol's name
        raise EngineUnavailable(self._health.detail)

    def cancel(self, request_id: str) -> None:
        """Nothing is in flight."""

    def health(self) -> Health:
        return self._health

    async def close(self) -> None:
        """Nothing to end."""
