"""Writes grammars for llguidance, and finds why it rejects one and where in a schema the cause is.

Compiling may take minutes and gigabytes: the server calls this module in children only (`compiler.py`).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

from server.errors import InvalidArgument
from server.grammar.answer_check import is_pattern
from server.grammar.response_format import ENUM
from server.grammar.schema import EnforceableSchema, enforceable
from server.grammar.schema_closure import Schema, children, placed
from server.grammar.schema_dialects import JSON_SCHEMA, OPENAPI, SchemaDialect
from server.grammar.schema_reader import step
from server.wire.json_schema import VALUE_KEYWORDS

if TYPE_CHECKING:
    from llguidance import LLTokenizer

REPAIR_SECONDS = 1.0
"""For finding what of one answer's schema cannot be enforced."""
FIRST_NAMED, MOST_NAMED = 257, 256
"""The tokens that a grammar may name by number, where bytes represent all others."""
MAX_GRAMMAR_CHARACTERS = 1_000_000

_NO_VALUE = "Unsatisfiable schema"
_NO_TEXT = "no text can match"
_TOKEN = re.compile(r"<\[(\d+)\]>")

JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    # Without \\u: an escaped name would count as another property.
    "json_allowed_escapes": 'nrtbf\\"',
}
"""JSON on one line, spaced as people write it: a model that is free to write white space may never stop."""


Unenforced = dict[str, bool]
"""Paths within a caller's schema that a grammar does not enforce, and whether the answer can be checked for each."""


def enforced(schema: Any, field: str, openapi: bool) -> tuple[str, Unenforced]:
    """The grammar of the JSON values that match a caller's schema, and what it does not enforce. Raises
    ``InvalidArgument`` naming the place of what is wrong, or of what no value can match."""
    found = enforceable(schema, field, OPENAPI if openapi else JSON_SCHEMA)
    place, problem = _weakened(found, time.process_time() + REPAIR_SECONDS, strictly=True)
    if problem:
        raise _unenforceable(field + place, problem)
    return json_grammar(found.document), found.unenforced


def chosen(schema: Any, field: str, openapi: bool) -> tuple[str, Unenforced]:
    """The grammar of the bare texts that a caller's schema lists in its ``enum``. Raises as `enforced` does."""
    found = enforceable(schema, field, OPENAPI if openapi else JSON_SCHEMA)
    texts = found.document.get("enum", [])
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise InvalidArgument.at(
            field, f"{field}: {ENUM} needs a schema of type STRING with an enum of texts that are not empty"
        )
    return accepted(choice_grammar(texts), field), found.unenforced


def accepted(grammar: str, field: str) -> str:
    """``grammar`` itself, if it compiles. Raises as `enforced` does."""
    if len(grammar) > MAX_GRAMMAR_CHARACTERS:
        raise InvalidArgument.at(
            field, f"{field}: the grammar has {len(grammar)} characters; at most {MAX_GRAMMAR_CHARACTERS} are read"
        )
    problem = grammar_problem(grammar)
    if problem:
        raise _unenforceable(field, problem)
    return grammar


def repaired(schema: Any, dialect: SchemaDialect, until: float) -> tuple[Schema, Unenforced]:
    """A function's parameters as a schema that compiles, as close to the caller's as can be, and what it does not
    enforce; never refuses.

    What llguidance cannot take is weakened, one place after the other, as long as the process has not computed until
    ``until`` (of ``time.process_time()``: how busy the machine is makes no difference).
    """
    found = enforceable(schema, "parameters", dialect)
    _, problem = _weakened(found, until, strictly=False)
    return ({"type": "object"}, {"": True}) if problem else (found.document, found.unenforced)


def _weakened(found: EnforceableSchema, until: float, strictly: bool) -> tuple[str, str]:
    """Leave to the check what llguidance does not take. Returns the place and the description of what is still wrong
    where the time is over, or with ``strictly`` where no value can match or a pattern is none."""
    for schema in [schema for _, schema in placed(found.document)]:
        for keyword in ("pattern", "patternProperties"):
            given = schema.get(keyword, ())
            for pattern in [given] if isinstance(given, str) else given:
                problem = schema_problem({"type": "string", "pattern": pattern}) if time.process_time() < until else ""
                if not problem or problem == _NO_TEXT:
                    continue
                if strictly and not is_pattern(pattern):
                    return found.place(schema) + step(keyword), problem
                found.drop(schema, keyword)
                break
    while problem := schema_problem(found.document):
        wrong, keyword = culprit(found.document, until)
        place = found.place(wrong) + (step(keyword) if keyword else "")
        if strictly and problem.startswith(_NO_VALUE):  # several keywords contradict each other
            return found.place(wrong), problem
        if time.process_time() > until or (strictly and problem == _NO_TEXT):
            return place, problem
        if keyword:
            found.drop(wrong, keyword)
        elif wrong is found.document:
            return place, problem
        else:
            # Its type alone is kept, then nothing.
            kind = wrong.get("type")
            kept = {"type": kind} if kind is not None and len(wrong) > 1 else {}
            wrong.clear()
            wrong.update(kept)
            found.unenforced[place] = True
    return "", ""


def json_grammar(document: Schema) -> str:
    """The grammar of the JSON values that match a converted schema."""
    return json.dumps({"grammars": [{"json_schema": {**document, "x-guidance": JSON_STYLE}}]})


def choice_grammar(texts: Sequence[str]) -> str:
    """The grammar of one of several texts."""
    rule = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    return json.dumps({"grammars": [{"lark_grammar": f"start: {rule}"}]})


def begins(grammar: str, text: str) -> bool:
    """Whether an answer that a compiled grammar allows can begin with ``text``."""
    from llguidance import LLMatcher

    return LLMatcher(byte_tokenizer(), grammar, log_level=0).validate_tokens(list(text.encode())) == len(text.encode())


def grammar_problem(grammar: str) -> str:
    """Why llguidance rejects a grammar; "" if it does not. Tokens that it names by number are taken as they are."""
    numbers: dict[str, int] = {}
    named = _TOKEN.sub(lambda found: f"<[{numbers.setdefault(found[1], FIRST_NAMED + len(numbers))}]>", grammar)
    return _problem(named) if len(numbers) <= MOST_NAMED else f"it names more than {MOST_NAMED} tokens by number"


def schema_problem(document: Schema) -> str:
    """Why llguidance rejects a converted schema; "" if it does not."""
    return _problem(json_grammar(document))


def _problem(grammar: str) -> str:
    """The first mask is computed too: it meets other limits, and most of a grammar is only prepared then.

    Bytes represent the model's tokens: reading a model's tokenizer would block the whole process for seconds.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False)  # the messages must not repeat a whole grammar
    matcher = LLMatcher(byte_tokenizer(), grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return _sentence(matcher.get_error()) if matcher.is_error() else ""


def culprit(document: Schema, until: float) -> tuple[Schema, str]:
    """The innermost schema of a document that does not compile by itself, and its keyword that is the cause, or the
    first of several; "" where there is none.

    The search ends at ``until``, of ``time.process_time()``, with what it has narrowed down by then.
    """
    definitions = document.get("$defs", {})

    def fails(schema: Any) -> bool:
        probed = isinstance(schema, dict) and time.process_time() < until
        return probed and bool(schema_problem({**schema, "$defs": definitions}))

    schema = document
    followed: set[str] = set()
    while True:
        child = next((child for _, child in children(schema) if fails(child)), None)
        name = schema.get("$ref", "").rpartition("/")[2]
        if child is not None:
            schema = child
        elif name and name not in followed:
            followed.add(name)
            schema = definitions[name]
        else:
            break
    keywords = [keyword for keyword in schema if keyword not in ("type", "$defs", "$ref")]
    alone = (keyword for keyword in keywords if fails({keyword: schema[keyword]}))
    # Else one that does not go with the others: limits before what they limit.
    limits = sorted(keywords, key=lambda keyword: keyword not in VALUE_KEYWORDS or keyword in ("required", "enum"))
    beside = (
        keyword
        for keyword in limits
        if time.process_time() < until and not fails({name: schema[name] for name in schema if name != keyword})
    )
    return schema, next(chain(alone, beside, limits), "")


def load() -> None:
    """Import what compiling needs."""
    byte_tokenizer()


@lru_cache(maxsize=1)
def byte_tokenizer() -> LLTokenizer:
    """A tokenizer whose tokens are the bytes, one for the end, and some that a grammar may name by number."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()), slices=[])


class _Bytes:
    """The tokenizer interface that llguidance expects."""

    eos_token_id = 256
    bos_token_id = None
    unk_token_id = None
    special_token_ids = tuple(range(256, FIRST_NAMED + MOST_NAMED))
    tokens = (*(bytes([byte]) for byte in range(256)), *(b"<|%d|>" % number for number in special_token_ids))

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _sentence(error: str) -> str:
    """llguidance's message as one line for the caller."""
    lines = error.strip().splitlines() or ["unknown"]
    if lines[0].startswith("oneOf"):
        return "more than one branch can match; use anyOf"
    if lines[0].startswith("NoExtension"):
        return _NO_TEXT
    reason = next((line for line in lines if line.startswith("error: ")), lines[0])
    return reason.removeprefix("error: ")[:300]


def _unenforceable(field: str, problem: str) -> InvalidArgument:
    return InvalidArgument.at(field, f"{field}: this cannot be enforced: {problem}")
