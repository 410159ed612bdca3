"""GenerationConfig to sampling parameters: what wins, and what caps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fakes import INFO
from support.templates import template_folder

from engine.api.sampling import SAMPLING_FIELDS, SamplingParams
from server.config.models_file import ModelSpec
from server.convert.chat_tokenizer import ChatTokenizer
from server.convert.sampling import answer_syntax, capped, output_limit, sampling_params
from server.errors import InvalidArgument
from server.wire.generation import GenerationConfig
from server.wire.message import parse
from server.wire.support import camel

SPEC = ModelSpec("m", "/m", max_output_tokens=100)


def params(prompt_tokens: int = 10, spec: ModelSpec = SPEC, **config: Any) -> SamplingParams:
    return sampling_params(parse(GenerationConfig, config), spec, INFO, (9, 2), prompt_tokens)


def test_requests_win_over_entries_over_defaults() -> None:
    spec = replace(SPEC, temperature=0.7, top_p=0.8, top_k=5)
    plain, entry, asked = params(), params(spec=spec), params(spec=spec, temperature=0, topP=0, topK=0)
    assert (plain.temperature, plain.top_p, plain.top_k) == (1.0, 1.0, 0)
    assert (entry.temperature, entry.top_p, entry.top_k) == (0.7, 0.8, 5)
    assert (asked.temperature, asked.top_p, asked.top_k) == (0.0, 0.0, 0)


def test_what_only_an_entry_can_set() -> None:
    spec = replace(SPEC, min_p=0.05, repetition_penalty=1.1)
    assert (params().min_p, params().repetition_penalty) == (0.0, 1.0)
    assert (params(spec=spec).min_p, params(spec=spec).repetition_penalty) == (0.05, 1.1)
    for name in ("minP", "min_p", "repetitionPenalty"):
        with pytest.raises(InvalidArgument, match=name):
            params(spec=spec, **{name: 0.5})


def test_a_request_for_the_likeliest_tokens_gets_no_penalty_that_it_cannot_name() -> None:
    spec = replace(SPEC, temperature=0.2, repetition_penalty=1.1)
    assert params(spec=spec, temperature=0).repetition_penalty == 1
    assert params(spec=spec, temperature=0.1).repetition_penalty == 1.1
    assert params(spec=replace(spec, temperature=0)).repetition_penalty == 1.1, (
        "the entry's own greedy is its own affair"
    )


def test_the_table_and_the_wire_name_the_same_fields() -> None:
    for name, field in SAMPLING_FIELDS.items():
        assert field.wire_name == (camel(name) if name in GenerationConfig.model_fields else None)
        values = range(-3, 4)
        if field.wire_name:
            for value in values:
                try:
                    served = getattr(params(**{field.wire_name: value}), name) == min(value, INFO.vocab_size)
                except InvalidArgument:
                    served = False
                assert served == (value in field.asked)


def test_top_k_is_never_more_than_the_vocabulary() -> None:
    assert params(topK=2**31 - 1).top_k == INFO.vocab_size


def test_the_answer_is_capped_by_request_entry_and_context() -> None:
    assert params().max_tokens == 100
    assert params(maxOutputTokens=5).max_tokens == 5
    assert params(maxOutputTokens=500).max_tokens == 100
    assert params(prompt_tokens=INFO.max_context - 3).max_tokens == 3
    assert output_limit(replace(SPEC, max_output_tokens=10**6), INFO) == INFO.max_context


def test_only_a_limit_over_the_models_is_named() -> None:
    for asked, named in [(100, []), (101, ["generationConfig.maxOutputTokens"])]:
        assert capped(parse(GenerationConfig, {"maxOutputTokens": asked}), SPEC, INFO) == named
    assert capped(GenerationConfig(), SPEC, INFO) == []


def test_end_tokens_of_engine_and_tokenizer() -> None:
    assert params().stop_ids == (2, 9)


def test_logprobs() -> None:
    assert params().logprobs is None
    assert params(responseLogprobs=True).logprobs == 0
    assert params(responseLogprobs=True, logprobs=20).logprobs == 20
    assert params(logprobs=0).logprobs is None
    with pytest.raises(InvalidArgument, match="responseLogprobs"):
        params(logprobs=1)


def test_stop_sequences_apply_to_an_answer_that_only_begins_like_a_call(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(template_folder(tmp_path / "model", "llama3"))
    call = tokenizer.family.call
    starts = (f"{call.call_start}f{call.name_args_separator}", f"{call.call_start}g{call.name_args_separator}")
    for given, begins in (((), (call.call_start,)), (starts, starts), (starts * 5, (call.call_start,))):
        found = answer_syntax(params(), tokenizer, True, None, "grammar", given)
        assert tuple(start for start, _ in found.stop_exempt) == begins
