"""Answers of a model that knows nothing match the schema that was sent: conversion, engine and all, 200 schemas."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from support.examples import examples
from support.sent_schemas import Sample, samples
from support.tiny import EOS_ID, tiny_model_folder

from engine.api.engine import EngineConfig
from engine.api.events import FinishReason
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.build import build_core
from engine.core.core import Core
from server.grammar.compiler import GrammarCompiler
from server.wire.generation import GenerationConfig
from server.wire.message import parse

BATCH = 10
MAX_TOKENS = 6000


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Core]:
    folder = tiny_model_folder(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1, max_position_embeddings=8192)
    built = build_core(EngineConfig(str(folder), device="cpu", threads=1), lambda *_: None)
    yield built
    built.check()
    built.close()


@settings(
    max_examples=examples(200 // BATCH),
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(drawn=samples(BATCH))
def test_every_answer_matches_its_schema(core: Core, drawn: list[Sample]) -> None:
    grammars = asyncio.run(compiled(drawn))
    for index, grammar in enumerate(grammars):
        params = SamplingParams(MAX_TOKENS, seed=index, stop_ids=(EOS_ID,), grammar=grammar)
        core.submit(Request(str(index), prompt=(10, 11, 12), sampling=params))
    texts, reasons = run(core)
    assert set(reasons.values()) == {FinishReason.STOP}, "the schemas are bounded, so every answer ends"
    for index, sample in enumerate(drawn):
        assert sample.problem(json.loads(texts[str(index)])) == "", texts[str(index)]


async def compiled(drawn: Sequence[Sample]) -> list[str]:
    """The grammar of each sample, by the way of a request's fields."""
    compiler, grammars = GrammarCompiler(seconds=60.0), []
    for sample in drawn:
        field = "responseSchema" if sample.openapi else "responseJsonSchema"
        config = parse(GenerationConfig, {"responseMimeType": "application/json", field: sample.sent})
        grammar = await compiler.answer(config)
        assert grammar is not None
        grammars.append(grammar.text)
    await compiler.close()
    return grammars


def run(core: Core) -> tuple[dict[str, str], dict[str, FinishReason]]:
    """Step until all requests have ended: their texts, and why each ended."""
    texts: dict[str, str] = {}
    reasons: dict[str, FinishReason] = {}
    for _ in range(20 * MAX_TOKENS):
        if not core.has_work:
            return texts, reasons
        for events in core.step():
            texts[events.request_id] = texts.get(events.request_id, "") + "".join(d.text for d in events.deltas)
            for finished in events.finished:
                reasons[events.request_id] = finished.reason
            assert events.done is None or events.done.error is None
    raise AssertionError("the engine still has work")
