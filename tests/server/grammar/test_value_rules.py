"""Arguments that are nearly JSON: what the grammar lets pass reads back as what the schema says."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from support.examples import examples
from support.schemas import schemas
from support.tiny import EOS_ID, tiny_tokenizer
from tokenizers import AddedToken

from engine.api.events import FinishReason
from server.convert.tools import Function, Tools
from server.families.answer_syntax import AnswerSyntax
from server.families.channels import GEMMA4 as GEMMA
from server.families.family import BareKeyArguments, Family
from server.families.python_calls import LFM2
from server.families.tool_call_reader import ToolCall
from server.grammar.llguidance import repaired
from server.grammar.schema_dialects import PARAMETERS
from server.grammar.tool_calls import tool_call_grammar
from server.mapper.parts import PartsParser

assert isinstance(GEMMA.call.arguments, BareKeyArguments)
QUOTE = GEMMA.call.arguments.quote
TOKENIZER = tiny_tokenizer()
MARKERS = dict.fromkeys((*GEMMA.markers, *LFM2.markers))
TOKENIZER.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in MARKERS])
ATOMS = {text: TOKENIZER.token_to_id(text) for text in MARKERS}
MODEL = LLTokenizer(TOKENIZER.to_str(), n_vocab=TOKENIZER.get_vocab_size(), eos_token=[EOS_ID])


def grammar(parameters: Any, family: Family = GEMMA) -> str:
    function = Function("f", "", parameters)
    schema, _ = repaired(parameters, PARAMETERS, time.process_time() + 60)
    return tool_call_grammar(Tools((function,), (function,), must_call=True), [schema], family, ATOMS)


def object_of(inner: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"v": inner}, "required": ["v"], **more}


def accepts(parameters: Any, family: Family = GEMMA) -> Callable[[str], bool]:
    """Whether arguments, as the family writes them, are let pass."""
    made = grammar(parameters, family)

    def whole(arguments: str) -> bool:
        matcher = LLMatcher(MODEL, made)
        assert not matcher.is_error(), matcher.get_error()
        ids = TOKENIZER.encode(family.call.write(("f", arguments)), add_special_tokens=False).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return whole


def arguments_of(text: str, family: Family = GEMMA) -> list[dict[str, Any]]:
    """The arguments that the mapper reads from the calls of an answer."""
    parser = PartsParser(AnswerSyntax(family, [Function("f").for_template()]))
    pieces = [*parser.feed(text), *parser.flush(FinishReason.STOP)]
    assert parser.problem == "", (parser.problem, text)
    calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
    assert len(calls) == len(pieces) > 0
    return [call.args for call in calls]


def walked(made: str, choice: random.Random, most: int = 4000) -> str:
    """A whole answer by a grammar, each token drawn from those that are allowed."""
    matcher = LLMatcher(MODEL, made)
    assert not matcher.is_error(), matcher.get_error()
    ids: list[int] = []
    while len(ids) < most:
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [token for token in range(MODEL.vocab_size) if mask >> token & 1]
        if EOS_ID in allowed:
            break
        printable = [
            token for token in allowed if token >= 256 or 32 <= ord((TOKENIZER.id_to_token(token) or "\0")[0]) < 127
        ]
        token = choice.choice(printable or allowed)
        assert matcher.consume_token(token)
        ids.append(token)
    return TOKENIZER.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("family", [GEMMA, LFM2], ids=lambda family: family.name)
@settings(max_examples=examples(100), suppress_health_check=list(HealthCheck))
@given(inner=schemas(), draw=st.integers(0, 2**32))
def test_what_is_let_pass_reads_back_and_matches_the_schema(family: Family, inner: Any, draw: int) -> None:
    text = walked(grammar(object_of(inner), family), random.Random(draw))
    relaxed = json.loads(json.dumps(object_of(inner)))
    _forget(relaxed, ("pattern", "format", "additionalProperties"))
    for found in arguments_of(text, family):
        jsonschema.validate(found, relaxed)


def _forget(schema: Any, keywords: tuple[str, ...]) -> None:
    """Drop what these rules do not enforce."""
    if isinstance(schema, dict):
        for keyword in keywords:
            schema.pop(keyword, None)
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _forget(inner, keywords)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string"}, [f'{QUOTE}a "b"\n{{c:1}}{QUOTE}', QUOTE * 2], ['"a"', "1", QUOTE]),
        ({"type": "string", "minLength": 1, "maxLength": 2}, [f"{QUOTE}ab{QUOTE}"], [QUOTE * 2, f"{QUOTE}abc{QUOTE}"]),
        ({"type": "string", "enum": ["x", ""]}, [f"{QUOTE}x{QUOTE}", QUOTE * 2], [f"{QUOTE}y{QUOTE}"]),
        ({"enum": [1, None, [True], {"k": "v"}]}, ["1", "null", "[true]", f"{{k:{QUOTE}v{QUOTE}}}"], ["2", "[false]"]),
        ({"const": "x"}, [f"{QUOTE}x{QUOTE}"], [f"{QUOTE}{QUOTE}"]),
        ({"type": "integer", "minimum": 3, "maximum": 12}, ["3", "12"], ["2", "13", "3.5", "x"]),
        ({"type": "number"}, ["-1.5", "0"], ["", "true"]),
        ({"type": ["boolean", "null"]}, ["true", "null"], ["0"]),
        ({"type": "array", "items": {"type": "integer"}}, ["[]", "[1,2,3]"], ["[1,]", "[true]", "1"]),
        ({"type": "array", "minItems": 2, "maxItems": 3}, ["[1,2]", "[1,[],3]"], ["[1]", "[1,2,3,4]", "[]"]),
        ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, ["1", "null"], ["true"]),
        ({"type": "object"}, ["{}", f"{{a:1,b:{{c:[{QUOTE}x{QUOTE}]}}}}"], ["{a}", '{"a":1}', "{a:1,}"]),
        ({}, ["1", "[]", "{}", "null", QUOTE * 2], ["x", '"x"']),
    ],
)
def test_each_keyword(schema: Any, good: list[str], bad: list[str]) -> None:
    whole = accepts(object_of(schema))
    assert [text for text in good if not whole(f"{{v:{text}}}")] == []
    assert [text for text in bad if whole(f"{{v:{text}}}")] == []


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (
            {"type": "string"},
            ["'a \"b\" {c}, é'", '"it\'s"', r"'a\'b\\ \n'", "''"],
            ["a", "'a\nb'", "'a'b'", r"'\x'", "'a"],
        ),
        ({"type": "string", "minLength": 1, "maxLength": 2}, ["'ab'", r'"\n\""'], ["''", "'abc'"]),
        ({"type": "string", "enum": ["x", "it's", ""]}, ["'x'", '"x"', r"'it\'s'", '"it\'s"', "''"], ["'y'", "x"]),
        ({"enum": [1, True, None, [False], {"k": "v"}]}, ["1", "True", "None", "[False]", "{'k': 'v'}"], ["true", "2"]),
        ({"type": "integer", "minimum": 3, "maximum": 12}, ["3", "12"], ["2", "13", "'3'"]),
        ({"type": ["boolean", "null"]}, ["True", "False", "None"], ["true", "null", "0"]),
        ({"type": "array", "minItems": 2}, ["[1, 'x']", "[[], {}, None]"], ["[1]", "[1,2]", "(1, 2)"]),
        ({"type": "object"}, ["{}", "{'a': 1, \"b\": {'c': ['x']}}"], ["{a: 1}", "{'a'}"]),
        ({}, ["1", "[]", "{}", "None", "''"], ["x", "null"]),
    ],
)
def test_each_keyword_in_python(schema: Any, good: list[str], bad: list[str]) -> None:
    whole = accepts(object_of(schema), LFM2)
    assert [text for text in good if not whole(f"v={text}")] == []
    assert [text for text in bad if whole(f"v={text}")] == []


def test_keyword_arguments_of_each_kind_of_schema() -> None:
    kinds = {name: {"type": "integer"} for name in "ab"}
    whole = accepts({"type": "object", "properties": kinds, "required": ["b"]}, LFM2)
    assert [whole(text) for text in ("b=1", "a=1, b=1", "a=1", "b=1, a=1", "b=1,", "'b'=1", "")] == [
        True,
        True,
        *[False] * 5,
    ]
    free = accepts({"type": "object"}, LFM2)
    assert [free(text) for text in ("", "x=1, y=['z']", "x")] == [True, True, False]
    referred = {"$ref": "#/$defs/p", "$defs": {"p": {"type": "object", "properties": kinds, "required": ["a"]}}}
    assert [accepts(referred, LFM2)(text) for text in ("a=1", "")] == [True, False]


def test_members_come_in_their_order_and_optional_ones_may_be_left_out() -> None:
    kinds = {name: {"type": "integer"} for name in "abcd"}
    whole = accepts({"type": "object", "properties": kinds, "required": ["b"]})
    for text in ("{b:1}", "{a:1,b:1}", "{b:1,d:1}", "{a:1,b:1,c:1,d:1}"):
        assert whole(text), text
    for text in ("{}", "{a:1}", "{b:1,a:1}", "{,b:1}", "{b:1,}", "{b:1,b:1}", "{b:1,e:1}"):
        assert not whole(text), text
    assert accepts({"type": "object", "properties": kinds})("{}")
    assert accepts({"type": "object", "properties": kinds})("{d:1}")


def test_a_key_that_is_no_word_is_quoted_and_read_back() -> None:
    whole = accepts({"type": "object", "properties": {"x y": {"type": "integer"}, "größe": {"type": "integer"}}})
    text = f"{{{QUOTE}x y{QUOTE}:1,größe:2}}"
    assert whole(text)
    assert arguments_of(GEMMA.call.write(("f", text))) == [{"x y": 1, "größe": 2}]


def test_open_objects_hold_what_is_not_declared() -> None:
    whole = accepts({"type": "object", "additionalProperties": {"type": "integer"}})
    assert whole("{a:1,b:2}")
    assert not whole("{a:true}")


def test_definitions_may_refer_to_themselves() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "n": {"type": "integer"}}}
    whole = accepts({**object_of({"$ref": "#/$defs/node"}), "$defs": {"node": node}})
    assert whole("{v:{next:{next:{n:1}},n:2}}")
    assert not whole("{v:{next:1}}")


def test_large_declarations_compile(tmp_path: Path) -> None:
    kinds = {f"p{index}": {"type": "array", "items": {"type": "string", "maxLength": 50}} for index in range(80)}
    assert accepts({"type": "object", "properties": kinds})(f"{{p79:[{QUOTE}x{QUOTE}]}}")
