"""Answers of a random tiny model under real grammars."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.digests import TOKENIZER, Told, ids, make_request, run_to_end
from support.examples import examples
from support.schemas import Schema, schemas
from support.tiny import EOS_ID, SPECIAL_TOKENS, VOCAB_SIZE, tiny_model_folder, tiny_tokenizer
from tokenizers import Tokenizer

from engine.api.engine import EngineConfig
from engine.api.errors import RequestRefused
from engine.api.events import ErrorKind, FinishReason
from engine.api.requests import Request
from engine.api.sampling import Thinking
from engine.build import build_core
from engine.constraints import masks
from engine.constraints.grammar import GrammarBuilder
from engine.core.core import Core

MAX_TOKENS = 300
PLAIN = tiny_tokenizer()
PLAIN.encode_special_tokens = True
"""Reads no control tokens in a text."""
LIMIT_GRAMMAR = """start: item+
item: a | b | c | d
a: "x" | "x" a
b: "x" | "x" b
c: "x" | "x" c
d: "x" | "x" d
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def core(folder: Path) -> Iterator[Core]:
    with closing(make(folder)) as core:
        yield core


def make(folder: Path, **config: Any) -> Core:
    return build_core(EngineConfig(str(folder), threads=1, **config), lambda stage, fraction: None)


def of_schema(schema: Schema) -> str:
    return json.dumps({"grammars": [{"json_schema": schema | {"x-guidance": {"whitespace_flexible": False}}}]})


def constrained(request_id: str, grammar: str, **changes: Any) -> Request:
    return make_request(request_id, **{"max_tokens": MAX_TOKENS, "grammar": grammar, "temperature": 1.0} | changes)


def expect_valid(result: Told, schema: Schema) -> int:
    """Check every candidate's answer that ended by itself; returns how many did."""
    assert result.done is not None
    assert result.done.error is None, (result.done.error, schema)
    ended = [candidate for candidate, reason in result.reasons.items() if reason is FinishReason.STOP]
    for candidate in ended:
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.validate(json.loads(result.text[candidate]), schema, format_checker=checker)
    assert set(result.reasons.values()) <= {FinishReason.STOP, FinishReason.MAX_TOKENS}
    return len(ended)


@settings(max_examples=examples(12), suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.lists(schemas(), min_size=10, max_size=10), st.integers(0, 2**32))
def test_answers_validate(core: Core, batch: list[Schema], seed: int) -> None:
    requests = [
        constrained(f"r{n}", of_schema(schema), seed=seed + n, candidates=1 + n % 2) for n, schema in enumerate(batch)
    ]
    results = run_to_end(core, *requests)
    ended = [expect_valid(results[f"r{n}"], schema) for n, schema in enumerate(batch)]
    assert sum(ended) >= 8


def test_answers_are_the_same_alone_and_among_others(core: Core, folder: Path) -> None:
    schema = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 10**9},
        "minItems": 4,
        "maxItems": 8,
    }
    requests = [
        constrained(
            f"r{n}",
            of_schema(schema) if n % 3 else None,  # type: ignore[arg-type]
            prompt=range(10, 20 + 5 * n),
            seed=n,
            max_tokens=60,
            stop_ids=(EOS_ID,) if n % 3 else (),
            thinking=Thinking((), (9,), open=True, budget=6) if n % 2 else None,
            logprobs=1,
        )
        for n in range(8)
    ]
    tight = make(folder, kv_memory=float(24 * 16 * 2 * 2 * 2 * 16 * 4), max_context=256)
    together = run_to_end(tight, *requests)
    assert tight.stats().preemptions > 0
    for request in requests:
        alone = run_to_end(core, request)[request.id]
        result = together[request.id]
        assert (result.tokens, result.text, result.reasons) == (alone.tokens, alone.text, alone.reasons)
        assert all(entry.chosen < 0 for entry in result.logprobs[0])


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ("start: /[0-9]{3}-[a-f]+/", "[0-9]{3}-[a-f]+"),
        ('start: "red" | "reddish" | "blue"', "red|reddish|blue"),
        ('start: "日本" | "👍" "é"', "日本|👍é"),
        (of_schema({"enum": ["one", 2, None]}), '"one"|2|null'),
    ],
)
def test_patterns_and_enums(core: Core, grammar: str, pattern: str, temperature: float) -> None:
    result = run_to_end(core, constrained("r", grammar, temperature=temperature, candidates=4))["r"]
    for candidate, text in result.text.items():
        if result.reasons[candidate] is FinishReason.STOP:
            assert re.fullmatch(pattern, text)
        else:
            assert "+" in pattern


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
@pytest.mark.parametrize("keyword", ["const", "enum", "pattern"])
def test_the_name_of_a_control_token_is_written_as_plain_text(core: Core, keyword: str, name: str) -> None:
    values = {"const": name, "enum": [f"a{name}", f"b{name}"], "pattern": f"^c{re.escape(name)}$"}
    result = run_to_end(core, constrained("r", of_schema({"type": "string", keyword: values[keyword]})))["r"]
    assert result.done is not None
    assert result.done.error is None
    assert result.reasons == {0: FinishReason.STOP}
    assert json.loads(result.text[0]) in {name, f"a{name}", f"b{name}", f"c{name}"}
    assert min(result.tokens[0]) >= len(SPECIAL_TOKENS)


def test_a_control_token_that_the_grammar_asks_for_is_one_token(core: Core) -> None:
    result = run_to_end(core, constrained("r", 'start: "a" <[1]> "<|im_start|>"'))["r"]
    assert result.tokens[0] == [*ids("a"), 1, *PLAIN.encode("<|im_start|>").ids]


def test_a_vocabulary_whose_merges_build_a_control_token(tmp_path: Path) -> None:
    """The end token is no added token here: it is a piece of text like any other, and made of two."""
    pair, twice = 259, 260
    described = json.loads(TOKENIZER.to_str())
    described["added_tokens"] = []
    described["model"]["vocab"] |= {"ab": pair, "abab": twice}
    described["model"]["merges"] = [["a", "b"], ["ab", "ab"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("abab").ids == [twice]
    matcher = GrammarBuilder(tokenizer, VOCAB_SIZE, (twice,)).build('start: "abab"')
    for _ in range(2):
        assert matcher.mask() == masks.only([pair], VOCAB_SIZE)
        matcher.consume(pair)
    assert matcher.accepting


def test_a_text_that_no_token_begins_is_refused() -> None:
    described = json.loads(TOKENIZER.to_str())
    del described["model"]["vocab"]["x"]
    builder = GrammarBuilder(Tokenizer.from_str(json.dumps(described)), VOCAB_SIZE, (EOS_ID,))
    assert builder.build('start: "a"').mask()
    with pytest.raises(RequestRefused, match="no token of this model begins such a text"):
        builder.build('start: "x"')


def test_every_stop_id_ends_where_the_grammar_may_end(core: Core) -> None:
    results = run_to_end(
        core,
        *(constrained(f"r{n}", "start: /a+/", stop_ids=(0, 1), seed=n, max_tokens=30) for n in range(10)),
    )
    ended = [result for result in results.values() if result.reasons[0] is FinishReason.STOP]
    assert len(ended) > 5
    assert all(set(result.tokens[0]) == set(ids("a")) for result in ended)


def test_a_grammar_beyond_the_limits_ends_its_candidate_alone(core: Core) -> None:
    limited = constrained("limited", LIMIT_GRAMMAR, stop_ids=())
    free = make_request("free", max_tokens=20, stop_ids=())
    results = run_to_end(core, limited, free)
    assert results["limited"].reasons == {0: FinishReason.MALFORMED}
    assert "items" in results["limited"].messages[0]
    assert "xx" not in results["limited"].messages[0]
    assert set(results["limited"].text[0]) == {"x"}
    assert results["free"].reasons == {0: FinishReason.MAX_TOKENS}


def test_what_cannot_be_compiled_is_refused(core: Core) -> None:
    done = run_to_end(core, constrained("r", "start: {"))["r"].done
    assert done is not None
    assert done.error is not None
    assert done.error.kind is ErrorKind.REFUSED
    assert "grammar" in done.error.message


def test_copies_of_a_matcher_go_their_own_ways() -> None:
    builder = GrammarBuilder(TOKENIZER, VOCAB_SIZE, (EOS_ID,))
    first = builder.build('start: "ab" | "cd"')
    second = first.copy()
    first.consume(ids("a")[0])
    second.consume(ids("c")[0])
    assert first.allows(ids("b")[0])
    assert second.allows(ids("d")[0])
    first.restart()
    assert first.allows(ids("a")[0])
    assert not second.allows(ids("a")[0])
    with pytest.raises(RequestRefused):
        builder.build("start: missing")


def test_rows_without_a_token_and_tokens_without_a_row_are_never_allowed() -> None:
    for vocab_size in (VOCAB_SIZE, 301, 200):
        mask = GrammarBuilder(TOKENIZER, vocab_size, (EOS_ID,)).build("start: /.+/").mask()
        assert len(mask) == (vocab_size + 7) // 8
        assert not any(mask[33:])
