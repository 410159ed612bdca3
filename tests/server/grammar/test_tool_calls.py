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
from server.families.family import CallSyntax, Family
from server.families.table import CASTOR, FAMILIES
from server.grammar.tool_calls import MAX_CALLS, MAX_UNLEARNED_CALLS, tool_grammar

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
    "json": '{"a": 1, "b": "two; <b>"}',
    "xml": "<parameter=a>\n1\n</parameter>\n<parameter=b>\n two\nlines\n</parameter>\n<parameter=c>\nx\n</parameter>\n",
    "quoted": '{a:1,b:<|"|>two; <b> {c:1}<|"|>,c:<|"|>x<|"|>}',
}
UNFIT = {
    "json": ['{"b": "x"}', '{"a": "x"}', '{"a": 1, "d": 1}', '{"a": 1, "c": "z"}', "1"],
    "xml": ["", "<parameter=a>\nx\n</parameter>\n", "<parameter=a>\n1\n</parameter>\n<parameter=c>\nz\n</parameter>\n"],
    "quoted": [
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
NOTHING = {"json": "{}", "xml": "", "quoted": "{}"}

Accepts = Callable[[str], str]


def written(call: CallSyntax, *calls: tuple[str, str]) -> str:
    each = [call.before + name + call.between + arguments + call.after for name, arguments in calls]
    return call.opening + call.separator.join(each) + call.closing


async def grammar_of(tmp_path: Path, family: Family, special: bool, tools: Tools) -> Accepts:
    """Tells whether a text is a whole answer, the head of one, or none."""
    tokenizer = tiny_tokenizer()
    tokens = [AddedToken(text, special=special, normalized=False) for text in family.markers]
    tokenizer.add_special_tokens(tokens) if special else tokenizer.add_tokens(tokens)
    added = tokenizer.get_added_tokens_decoder()
    atom_ids = {token.content: index for index, token in added.items() if is_atom(token)}
    grammar = tool_grammar(tools, family, atom_ids)
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
SETTINGS += [(family, False) for family, _ in SETTINGS if family.call.arguments != "quoted"]
every_family = pytest.mark.parametrize(
    ("family", "special"), SETTINGS, ids=lambda value: getattr(value, "name", f"special={value}")
)


@every_family
async def test_who_must_call_can_do_nothing_else(tmp_path: Path, family: Family, special: bool) -> None:
    accepts = await grammar_of(tmp_path, family, special, Tools((ADD, NOW, OTHER), (ADD, NOW), must_call=True))
    call, kind = family.call, family.call.arguments
    assert accepts(written(call, ("now", NOTHING[kind]))) == "whole"
    assert accepts(written(call, ("add", FIT[kind]))) == "whole"
    assert accepts("") == "head"
    assert accepts("Hello") == "none"
    assert accepts(written(call, ("other", NOTHING[kind]))) == "none"
    for arguments in UNFIT[kind]:
        assert accepts(written(call, ("add", arguments))) == "none"


@every_family
async def test_calls_come_to_an_end(tmp_path: Path, family: Family, special: bool) -> None:
    accepts = await grammar_of(tmp_path, family, special, Tools((NOW,), (NOW,), must_call=True))
    call = ("now", NOTHING[family.call.arguments])
    learned = MAX_CALLS if family.call.repeats else MAX_UNLEARNED_CALLS
    many = learned if family.call.parallel else 1
    assert accepts(written(family.call, *[call] * many)) == "whole"
    assert accepts(written(family.call, *[call] * (many + 1))) == "none"
    assert accepts(written(family.call, call) + " And") == "none"


@every_family
async def test_who_may_call_is_free_until_a_call_begins(tmp_path: Path, family: Family, special: bool) -> None:
    accepts = await grammar_of(tmp_path, family, special, Tools((ADD,), (ADD,)))
    call, kind = family.call, family.call.arguments
    good = written(call, ("add", FIT[kind]))
    assert accepts(family.lead) == "whole"
    assert accepts(family.lead + 'Hello <b> {"a": [1]}\n') == "whole"
    assert accepts(good) == "whole"
    assert accepts(written(call, ("sub", FIT[kind]))) == "none"
    for arguments in UNFIT[kind]:
        assert accepts(written(call, ("add", arguments))) == "none"
    if call.begin and not family.lead:
        assert accepts("I add.\n" + good) == "whole"
        assert accepts("I add.\n" + call.begin) == "head"
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
    assert accepts(written(CASTOR.call, ("f", '{"a": "y"}'))) == "whole"
    assert accepts(written(CASTOR.call, ("f", '"y"'))) == "none"


async def test_parameters_keep_their_kinds_in_tags(tmp_path: Path) -> None:
    properties = {
        "list": {"type": "array", "items": {"type": "integer"}},
        "text": {"type": "string", "nullable": True},
        "node": {"$ref": "#/$defs/node"},
    }
    definitions = {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}}
    function = Function("f", "", {"type": "object", "properties": properties, "$defs": definitions})
    family = next(family for family in FAMILIES if family.call.arguments == "xml")
    accepts = await grammar_of(tmp_path, family, True, Tools((function,), (function,), must_call=True))

    def given(name: str, value: str) -> str:
        return accepts(written(family.call, ("f", f"<parameter={name}>\n{value}\n</parameter>\n")))

    assert [given("list", "[1, 2]"), given("list", "x")] == ["whole", "none"]
    assert [given("text", "null"), given("text", "two\nlines")] == ["whole", "whole"]
    assert [given("node", '{"next": {}}'), given("node", '{"next": 1}')] == ["whole", "none"]
