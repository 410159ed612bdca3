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
from server.errors import InvalidArgument
from server.families.channels import MUSE
from server.families.family import (
    Arguments,
    BareKeyArguments,
    Family,
    JsonArguments,
    PythonArguments,
    TaggedArguments,
)
from server.families.table import FAMILIES
from server.families.tagged_arguments import QWEN_XML
from server.families.tagged_calls import CASTOR
from server.families.token_calls import KIMI
from server.grammar.llguidance import chosen, enforced
from server.grammar.tool_calls import MAX_CALLS, MAX_UNLEARNED_CALLS, call_starts, checked_tool_call_grammar

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


def fit(arguments: Arguments) -> str:
    """Arguments of ``add`` as a family writes them."""
    match arguments:
        case TaggedArguments():
            return tagged(arguments, a="1", b=" two\nlines", c="x")
        case BareKeyArguments():
            return '{a:1,b:<|"|>two; <b> {c:1}<|"|>,c:<|"|>x<|"|>}'
        case PythonArguments():
            return "a=1, b='two; <b>', c='x'"
    return '{"a": 1, "b": "two; <b>"}'


def unfit(arguments: Arguments) -> list[str]:
    """What does not follow the schema of ``add``."""
    match arguments:
        case TaggedArguments():
            return ["", tagged(arguments, a="x"), tagged(arguments, a="1", c="z")]
        case BareKeyArguments():
            texts = ['{b:<|"|>x<|"|>}', '{a:<|"|>x<|"|>}', "{a:1,d:1}", '{a:1,c:<|"|>z<|"|>}', '{a:1,b:"x"}']
            return [*texts, "{a:1 }", "{a:1,}", "1"]
        case PythonArguments():
            return ["", "b='x'", "a='x'", "a=1, d=1", "a=1, c='z'", "a=1, b=x", "a=1, b='x\ny'", "a=1, ", "1"]
    return ['{"b": "x"}', '{"a": "x"}', '{"a": 1, "d": 1}', '{"a": 1, "c": "z"}', "1"]


def nothing(arguments: Arguments) -> str:
    return "{}" if isinstance(arguments, JsonArguments | BareKeyArguments) else ""


def tagged(tags: TaggedArguments, **values: str) -> str:
    return "".join(f"{tags.start.format(name=name)}{value}{tags.end}" for name, value in values.items())


Accepts = Callable[[str], str]


async def grammar_of(tmp_path: Path, family: Family, special: bool, tools: Tools, answer: str = "") -> Accepts:
    """Tells whether a text is a whole answer, the head of one, or none."""
    tokenizer = tiny_tokenizer()
    tokens = [AddedToken(text, special=special, normalized=False) for text in family.markers]
    tokenizer.add_special_tokens(tokens) if special else tokenizer.add_tokens(tokens)
    added = tokenizer.get_added_tokens_decoder()
    atom_ids = {token.content: index for index, token in added.items() if is_atom(token)}
    grammar, _, _ = checked_tool_call_grammar(tools, family, atom_ids, answer)
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
    call, kind = family.call, family.call.arguments
    assert accepts(call.write(("now", nothing(kind)))) == "whole"
    assert accepts(call.write(("add", fit(kind)))) == "whole"
    assert accepts("") == "head"
    assert accepts("Hello") == "none"
    assert accepts(call.write(("other", nothing(kind)))) == "none"
    for arguments in unfit(kind):
        assert accepts(call.write(("add", arguments))) == "none"


async def test_a_recipient_may_begin_as_the_user_does(tmp_path: Path) -> None:
    function = Function("user_info", "", SCHEMA)
    accepts = await grammar_of(tmp_path, MUSE, True, Tools((function,), (function,)))
    assert accepts(MUSE.call.write(("user_info", fit(MUSE.call.arguments)))) == "whole"
    assert accepts(MUSE.answer_header + "Hello") == "whole"


async def test_calls_are_numbered_as_the_model_likes(tmp_path: Path) -> None:
    accepts = await grammar_of(tmp_path, KIMI, True, Tools((NOW,), (NOW,), must_call=True))
    call = KIMI.call.write(("now", "{}"))
    assert [accepts(call.replace(":0", number)) for number in (":7", ":123", ":", "")] == [
        "whole",
        "whole",
        "none",
        "none",
    ]


@every_family
async def test_calls_come_to_an_end(tmp_path: Path, family: Family, special: bool) -> None:
    one, two = Tools((NOW,), (NOW,), must_call=True), Tools((NOW, OTHER), (NOW, OTHER), must_call=True)
    for tools, unlearned in ((one, 1), (two, MAX_UNLEARNED_CALLS)):
        _check_end(await grammar_of(tmp_path, family, special, tools), family, unlearned)


def _check_end(accepts: Accepts, family: Family, unlearned: int) -> None:
    call = ("now", nothing(family.call.arguments))
    learned = MAX_CALLS if family.call.keeps_duplicates else unlearned
    many = learned if family.call.is_parallel else 1
    assert accepts(family.call.write(*[call] * many)) == "whole"
    assert accepts(family.call.write(*[call] * (many + 1))) == "none"
    assert accepts(family.call.write(call) + " And") == "none"


@every_family
async def test_who_may_call_is_free_until_a_call_begins(tmp_path: Path, family: Family, special: bool) -> None:
    accepts = await grammar_of(tmp_path, family, special, Tools((ADD,), (ADD,)))
    call, kind = family.call, family.call.arguments
    good = call.write(("add", fit(kind)))
    assert accepts(family.answer_header) == "whole"
    assert accepts(family.answer_header + 'Hello <b> {"a": [1]}\n') == "whole"
    assert accepts(good) == "whole"
    assert accepts(call.write(("sub", fit(kind)))) == "none"
    for arguments in unfit(kind):
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


TEMP = {"type": "object", "properties": {"temp": {"type": "integer"}}, "required": ["temp"]}


@every_family
async def test_beside_a_schema_an_answer_is_calls_or_follows_it(tmp_path: Path, family: Family, special: bool) -> None:
    answer, _ = enforced(TEMP, "f", False)
    accepts = await grammar_of(tmp_path, family, special, Tools((ADD, NOW), (ADD, NOW)), answer)
    call, kind, header = family.call, family.call.arguments, family.answer_header
    assert accepts(header + '{"temp": 3}') == "whole"
    assert accepts(call.write(("add", fit(kind)))) == "whole"
    assert accepts(call.write(("now", nothing(kind)))) == "whole"
    if call.is_parallel:
        assert accepts(call.write(("add", fit(kind)), ("now", nothing(kind)))) == "whole"
    assert accepts(header + "Hello") == "none"
    assert accepts(header + '{"temp": "x"}') == "none"
    assert accepts(header + '{"temp": 3}' + call.write(("now", nothing(kind)))) == "none"
    for arguments in unfit(kind):
        assert accepts(call.write(("add", arguments))) == "none"


LLAMA = next(family for family in FAMILIES if not family.call.trigger)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
}


async def test_calls_without_a_marker_differ_from_answers_that_begin_alike(tmp_path: Path) -> None:
    answer, _ = enforced(PERSON, "f", False)
    atoms = {LLAMA.call.call_token: 300}
    starts = call_starts(Tools((ADD, NOW), (ADD, NOW)), LLAMA, atoms, answer)
    assert starts == ('{"name": "add", "parameters": ', '{"name": "now", "parameters": ')
    accepts = await grammar_of(tmp_path, LLAMA, True, Tools((ADD, NOW), (ADD, NOW)), answer)
    for whole in ('{"name": "add"}', '{"name": "Bob", "age": 3}', '{"name": "add", "age": 3}'):
        assert accepts(whole) == "whole"
    assert accepts(LLAMA.call.write(("add", '{"a": 1}'), ("now", "{}"))) == "whole"
    assert accepts(LLAMA.call.write(("add", '{"b": "x"}'))) == "none"
    assert accepts('{"name": "Bob"}; ' + LLAMA.call.write(("now", "{}"))) == "none"


async def test_where_answers_may_look_like_calls_a_token_tells_them_apart(tmp_path: Path) -> None:
    anything, _ = enforced({}, "f", False)
    tools, token = Tools((NOW,), (NOW,)), LLAMA.call.call_token
    assert call_starts(tools, LLAMA, {token: 300}, anything) == (token,)
    accepts = await grammar_of(tmp_path, LLAMA, True, tools, anything)
    call = LLAMA.call.write(("now", "{}"))
    assert [accepts(token + call), accepts(call), accepts(token + "[]")] == ["whole", "whole", "none"]
    with pytest.raises(InvalidArgument, match="as a call does"):
        call_starts(tools, LLAMA, {}, anything)


def test_choices_that_begin_like_a_call_are_refused() -> None:
    choices, _ = chosen({"enum": ["a", f"{CASTOR.call.trigger}b"]}, "f", False)
    with pytest.raises(InvalidArgument, match="could begin with '<tool_call>'"):
        call_starts(Tools((NOW,), (NOW,)), CASTOR, {}, choices)
    assert call_starts(Tools((NOW,), (NOW,)), CASTOR, {CASTOR.call.trigger: 300}, choices) == ()


@pytest.mark.parametrize(
    ("family", "lost"),
    [("hermes", set()), ("qwen-xml", {".properties.s.pattern"}), ("gemma4", {".properties.s.pattern", ".allOf"})],
)
def test_what_the_syntax_of_a_family_does_not_enforce_is_named(family: str, lost: set[str]) -> None:
    parameters: dict[str, Any] = {
        "type": "object",
        "properties": {"s": {"type": "string", "pattern": "^a+$"}, "l": {"type": "array", "uniqueItems": True}},
        "allOf": [{"required": ["s"]}],
    }
    function = Function("f", "", parameters)
    [syntax] = [known for known in FAMILIES if known.name == family]
    _, [unenforced], _ = checked_tool_call_grammar(Tools((function,), (function,)), syntax, {'<|"|>': 300})
    assert unenforced == dict.fromkeys({*lost, ".properties.l.uniqueItems", *({".allOf"} if lost else ())}, True)


async def test_parameters_keep_their_kinds_in_tags(tmp_path: Path) -> None:
    properties = {
        "list": {"type": "array", "items": {"type": "integer"}},
        "text": {"type": "string", "nullable": True},
        "node": {"$ref": "#/$defs/node"},
    }
    definitions = {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}}
    function = Function("f", "", {"type": "object", "properties": properties, "$defs": definitions})
    family, tags = QWEN_XML, QWEN_XML.call.arguments
    assert isinstance(tags, TaggedArguments)
    accepts = await grammar_of(tmp_path, family, True, Tools((function,), (function,), must_call=True))

    def given(name: str, value: str) -> str:
        return accepts(family.call.write(("f", tagged(tags, **{name: value}))))

    assert [given("list", "[1, 2]"), given("list", "x")] == ["whole", "none"]
    assert [given("text", "null"), given("text", "two\nlines")] == ["whole", "whole"]
    assert [given("node", '{"next": {}}'), given("node", '{"next": 1}')] == ["whole", "none"]
