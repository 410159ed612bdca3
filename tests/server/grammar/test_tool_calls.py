"""The grammar of calls: what every family's model can and cannot write when functions are declared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from support.tiny import EOS_ID, tiny_tokenizer
from tokenizers import AddedToken

from server.convert.template_probe import is_atom
from server.convert.tools import Function, Tools
from server.families.family import BareKeyArguments, Family, JsonArguments, TaggedArguments
from server.families.table import FAMILIES
from server.families.tagged_calls import CASTOR
from server.grammar.tool_calls import MAX_CALLS, MAX_UNLEARNED_CALLS, checked_tool_call_grammar

SCHEMA = {
    "type": "OBJECT",
    "properties": {
        "a": {"type": "INTEGER"},
        "b": {"type": "STRING", "description": "Any text."},
        "c": {"type": "STRING", "enum": ["x", "y"]},
    },
    "required": ["a"],
}
ADD, NOW, OTHER = Function("add", "", SCHEMA), Function("now"), Function("other")
FIT = {
    JsonArguments: '{"a": 1, "b": "two; <b>"}',
    TaggedArguments: "<parameter=a>\n1\n</parameter>\n<parameter=b>\n two\nlines\n</parameter>\n"
    "<parameter=c>\nx\n</parameter>\n",
    BareKeyArguments: '{a:1,b:<|"|>two; <b> {c:1}<|"|>,c:<|"|>x<|"|>}',
}
UNFIT = {
    JsonArguments: ['{"b": "x"}', '{"a": "x"}', '{"a": 1, "d": 1}', '{"a": 1, "c": "z"}', "1"],
    TaggedArguments: [
        "",
        "<parameter=a>\nx\n</parameter>\n",
        "<parameter=a>\n1\n</parameter>\n<parameter=c>\nz\n</parameter>\n",
    ],
    BareKeyArguments: [
        '{b:<|"|>x<|"|>}',
        '{a:<|"|>x<|"|>}',
        "{a:1,d:1}",
        '{a:1,c:<|"|>z<|"|>}',
        '{a:1,b:"x"}',
        "{a:1 }",
        "{a:1,}",
        "1",
    ],
}
NOTHING = {JsonArguments: "{}", TaggedArguments: "", BareKeyArguments: "{}"}

Accepts = Callable[[str], str]


async def grammar_of(tmp_path: Path, family: Family, special: bool, tools: Tools) -> Accepts:
    """Tells whether a text is a whole answer, the head of one, or none."""
    tokenizer = tiny_tokenizer()
    tokens = [AddedToken(text, special=special, normalized=False) for text in family.markers]
    tokenizer.add_special_tokens(tokens) if special else tokenizer.add_tokens(tokens)
    added = tokenizer.get_added_tokens_decoder()
    atom_ids = {token.content: index for index, token in added.items() if is_atom(token)}
    grammar = checked_tool_call_grammar(tools, family, atom_ids)
    model = LLTokenizer(tokenizer.to_str(), n_vocab=tokenizer.get_vocab_size(), eos_token=[EOS_ID])

    def accepts(text: str) -> str:
        matcher = LLMatcher(model, grammar)
        assert not matcher.is_error(), matcher.get_error()
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if matcher.try_consume_tokens(ids) < len(ids):
            return "none"
        return "whole" if matcher.is_accepting() else "head"

    return accepts


# Gemma's quotes are special tokens in every tokenizer that has them; other markers may be plain text.
SETTINGS = [(family, True) for family in (*FAMILIES, CASTOR)]
SETTINGS += [(family, False) for family, _ in SETTINGS if not isinstance(family.call.arguments, BareKeyArguments)]
every_family = pytest.mark.parametrize(
    ("family", "special"), SETTINGS, ids=lambda value: getattr(value, "name", f"special={value}")
)


@every_family
async def test_who_must_call_can_do_nothing_else(tmp_path: Path, family: Family, special: bool) -> None:
    accepts = await grammar_of(tmp_path, family, special, Tools((ADD, NOW, OTHER), (ADD, NOW), must_call=True))
    call, kind = family.call, type(family.call.arguments)
    assert accepts(call.write(("now", NOTHING[kind]))) == "whole"
    assert accepts(call.write(("add", FIT[kind]))) == "whole"
    assert accepts("") == "head"
    assert accepts("Hello") == "none"
    assert accepts(call.write(("other", NOTHING[kind]))) == "none"
    for arguments in UNFIT[kind]:
        assert accepts(call.write(("add", arguments))) == "none"


@every_family
async def test_calls_come_to_an_end(tmp_path: Path, family: Family, special: bool) -> None:
    one, two = Tools((NOW,), (NOW,), must_call=True), Tools((NOW, OTHER), (NOW, OTHER), must_call=True)
    for tools, unlearned in ((one, 1), (two, MAX_UNLEARNED_CALLS)):
        _check_end(await grammar_of(tmp_path, family, special, tools), family, unlearned)


def _check_end(accepts: Accepts, family: Family, unlearned: int) -> None:
    call = ("now", NOTHING[type(family.call.arguments)])
    learned = MAX_CALLS if family.call.keeps_duplicates else unlearned
    many = learned if family.call.is_parallel else 1
    assert accepts(family.call.write(*[call] * many)) == "whole"
    assert accepts(family.call.write(*[call] * (many + 1))) == "none"
    assert accepts(family.call.write(call) + " And") == "none"


@every_family
async def test_who_may_call_is_free_until_a_call_begins(tmp_path: Path, family: Family, special: bool) -> None:
    accepts = await grammar_of(tmp_path, family, special, Tools((ADD,), (ADD,)))
    call, kind = family.call, type(family.call.arguments)
    good = call.write(("add", FIT[kind]))
    assert accepts(family.answer_header) == "whole"
    assert accepts(family.answer_header + 'Hello <b> {"a": [1]}\n') == "whole"
    assert accepts(good) == "whole"
    assert accepts(call.write(("sub", FIT[kind]))) == "none"
    for arguments in UNFIT[kind]:
        assert accepts(call.write(("add", arguments))) == "none"
    if call.trigger and not family.answer_header:
        assert accepts("I add.\n" + good) == "whole"
        assert accepts("I add.\n" + call.trigger) == "head"
        assert accepts(good + " Done.") == "none"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)y"}}, "not": {"required": ["b"]}},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/missing"}}},
        {"type": "nonsense", "properties": []},
    ],
)
async def test_a_schema_that_cannot_be_enforced_is_relaxed(tmp_path: Path, schema: Any) -> None:
    function = Function("f", "", schema)
    accepts = await grammar_of(tmp_path, CASTOR, True, Tools((function,), (function,), must_call=True))
    assert accepts(CASTOR.call.write(("f", '{"a": "y"}'))) == "whole"
    assert accepts(CASTOR.call.write(("f", '"y"'))) == "none"


async def test_parameters_keep_their_kinds_in_tags(tmp_path: Path) -> None:
    properties = {
        "list": {"type": "array", "items": {"type": "integer"}},
        "text": {"type": "string", "nullable": True},
        "node": {"$ref": "#/$defs/node"},
    }
    definitions = {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}}
    function = Function("f", "", {"type": "object", "properties": properties, "$defs": definitions})
    family = next(family for family in FAMILIES if isinstance(family.call.arguments, TaggedArguments))
    accepts = await grammar_of(tmp_path, family, True, Tools((function,), (function,), must_call=True))

    def given(name: str, value: str) -> str:
        return accepts(family.call.write(("f", f"<parameter={name}>\n{value}\n</parameter>\n")))

    assert [given("list", "[1, 2]"), given("list", "x")] == ["whole", "none"]
    assert [given("text", "null"), given("text", "two\nlines")] == ["whole", "whole"]
    assert [given("node", '{"next": {}}'), given("node", '{"next": 1}')] == ["whole", "none"]
