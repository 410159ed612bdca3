"""Hostile schemas by kind: each asks for more numbers, states, levels or names than a server should process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from hostile_schemas.numbers import bounds, counts, divisors
from hostile_schemas.patterns import pattern
from hostile_schemas.valid import valid

Schema = dict[str, Any]

CONTROL = ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_start|>system\n", "</s>", "<tool_call>", "\0", "\u2028")
MANY = (3, 40, 300, 2000, 9000)
"""Numbers of siblings: the largest are near or over the limits on a schema's size."""
DEEP = (5, 40, 97, 140, 300)
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 3.5, 1e308, "", "x", [], {}, [None], {"": None}, [[[]]], "9" * 5000, 10**4000),
    *(["string", 5], {"type": "object"}, {"$ref": "#"}, ["a", "a"], "\ud7ff", [True], {"enum": []}),
)
KEYWORDS = (
    *("type", "enum", "const", "format", "pattern", "required", "propertyOrdering", "nullable", "minimum", "maximum"),
    *("exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "minItems", "maxItems", "items"),
    *("minProperties", "maxProperties", "additionalProperties", "anyOf", "oneOf", "allOf", "prefixItems", "properties"),
    *("patternProperties", "$ref", "$defs", "$id", "$schema", "not", "if", "contains", "uniqueItems", "default", "ref"),
)

APPLIED = (
    *("not", "if", "then", "else", "contains", "propertyNames", "unevaluatedItems", "unevaluatedProperties"),
    *("patternProperties", "dependencies", "oneOf"),
)
COUNTED = ("minContains", "maxContains", "minProperties", "maxProperties")


def several(random: Random) -> Schema:
    """Divisors with a large least common multiple, combined in one of several ways."""
    parts = [
        {"type": random.choice(("integer", "number")), **divisors(random)} for _ in range(random.choice((2, 3, 9, 60)))
    ]
    named = {f"d{index}": part for index, part in enumerate(parts)}
    references = [{"$ref": f"#/$defs/{name}"} for name in named]
    chain = {name: {**part, "$ref": f"#/$defs/d{index + 1}"} for index, (name, part) in enumerate(named.items())}
    chain[f"d{len(parts) - 1}"].pop("$ref")
    return random.choice(
        (
            {"allOf": parts},
            {"allOf": references, "$defs": named},
            {**references[0], **parts[-1], "$defs": named},
            {"$ref": "#/$defs/d0", "$defs": chain},
            {"anyOf": parts, "allOf": parts[:2]},
            {"type": "array", "items": {"allOf": parts}, "minItems": 3},
        )
    )


def texts(random: Random) -> Schema:
    """Patterns, alone and several on one text, beside lengths and formats."""
    kind = {"type": "string", "pattern": pattern(random)}
    return random.choice(
        (
            kind,
            {**kind, "minLength": random.choice((0, 50, 3000)), "maxLength": random.choice((1, 60, 9000, 10**9))},
            {**kind, "format": random.choice(("uri", "email", "date-time", "ipv6"))},
            {"allOf": [{"type": "string", "pattern": pattern(random)} for _ in range(random.choice((2, 5, 8, 9, 30)))]},
            {"anyOf": [{"type": "string", "pattern": pattern(random)} for _ in range(random.choice((2, 9, 60)))]},
        )
    )


def choices(random: Random) -> Schema:
    """Enums of thousands of values, of long ones, and of control tokens."""
    many = random.choice(MANY)
    return random.choice(
        (
            {"type": "string", "enum": [f"value {index}" for index in range(many)]},
            {"enum": list(range(many))},
            {"type": "string", "enum": ["a" * length for length in range(1, min(many, 500))]},
            {"enum": [random.choice(JUNK) for _ in range(min(many, 40))]},
            {"type": "string", "enum": [random.choice(CONTROL) + str(index) for index in range(min(many, 300))]},
            {"const": random.choice(CONTROL) * random.choice((1, 1, 200))},
            {"const": {name: list(CONTROL) for name in CONTROL}},
            {"const": "x" * random.choice((10, 9000, 150_000))},
            {"type": "string", "enum": list(CONTROL)},
        )
    )


def deep(random: Random) -> Schema:
    """Deep nesting."""
    levels = random.choice(DEEP)
    wrap: Callable[[Any], Schema] = random.choice(
        (
            lambda inner: {"type": "array", "items": inner},
            lambda inner: {"type": "array", "items": inner, "minItems": 2},
            lambda inner: {"type": "object", "properties": {"a": inner}, "required": ["a"]},
            lambda inner: {"anyOf": [inner, {"type": "null"}]},
            lambda inner: {"allOf": [inner, {"title": "x"}]},
            lambda inner: {"additionalProperties": inner},
            lambda inner: {"prefixItems": [inner]},
            lambda inner: {"patternProperties": {"^a": inner}},
        )
    )
    found: Schema = {"type": "string"}
    if random.random() < 0.1:
        for _ in range(12):
            found = {"type": "object", "properties": {"a": found, "b": found}}
        return found
    for _ in range(levels):
        found = wrap(found)
    return found


def references(random: Random) -> Schema:
    """Recursive, endless, chained, doubled and broken references."""
    size = random.choice((2, 12, 40, 300, 2000))
    chain = {f"n{index}": {"$ref": f"#/$defs/n{index + 1}"} for index in range(size)}
    joint = random.choice(("anyOf", "allOf", "oneOf", "prefixItems"))
    doubled = {f"n{index}": {joint: [{"$ref": f"#/$defs/n{index + 1}"}] * 2} for index in range(size)}
    objects = {
        f"n{index}": {"type": "object", "properties": {key: {"$ref": f"#/$defs/n{index + 1}"} for key in "abc"}}
        for index in range(size)
    }
    last = {f"n{size}": random.choice(({"type": "integer"}, {"$ref": "#/$defs/n0"}, {"$ref": "#"}, valid(random, 2)))}
    self_ = {"$ref": "#"}
    pointers = ("#", "#/", "#//", "#/$defs", "#/$defs/n0/x", "#/~0~1~", "#/%24defs/n0", "#/properties/a", "#n0", "n0")
    return random.choice(
        (
            {"$ref": "#/$defs/n0", "$defs": chain | last},
            {"$ref": "#/$defs/n0", "$defs": doubled | last},
            {"$ref": "#/$defs/n0", "$defs": objects | last},
            {"type": "object", "properties": {"next": self_, "v": valid(random, 2)}, "required": ["next"]},
            {"type": "object", "properties": {"next": {"anyOf": [self_, {"type": "null"}]}}},
            {"type": "array", "items": self_, "minItems": random.choice((0, 1, 50))},
            {random.choice(("anyOf", "allOf", "oneOf")): [self_, self_, valid(random, 2)]},
            {**self_, "minimum": 3},
            {"properties": {"a": {"$ref": random.choice(pointers)}}, "$defs": chain | last},
            {"$ref": random.choice(("http://localhost/x", "file:///etc/passwd", "//x", "../x", ""))},
        )
    )


def crossed(random: Random) -> Schema:
    """Choices combined with choices: k of m branches each give m to the power of k."""
    layers, branches = random.choice((2, 4, 9, 20)), random.choice((2, 5, 30))
    makes: tuple[Callable[[int, int], Schema], ...] = (
        lambda layer, branch: {"type": "string", "pattern": f"{layer}.*{branch}"},
        lambda layer, branch: {
            "type": "object",
            "properties": {f"p{layer}": {"const": branch}},
            "required": [f"p{layer}"],
        },
        lambda layer, branch: {"type": "integer", "multipleOf": 2 + layer * branches + branch},
        lambda layer, branch: {"type": "array", "prefixItems": [{"type": "integer"}] * layer + [{"const": branch}]},
        lambda _layer, _branch: valid(random, 2),
    )
    make = random.choice(makes)
    joint = random.choice(("anyOf", "anyOf", "oneOf"))
    return {"allOf": [{joint: [make(layer, branch) for branch in range(branches)]} for layer in range(layers)]}


def names(random: Random) -> Schema:
    """Objects of thousands of properties, and unlikely names."""
    many = random.choice(MANY)
    odd = ["", " ", "\n", '"', "\\", "/", "~", "é" * 500, "漢" * 300, "\u202e", "#", "$ref", "__proto__", *CONTROL]
    kinds = {name: {"type": "integer"} for name in random.sample(odd, random.randint(1, len(odd)))}
    wide = {f"p{index}": random.choice(({}, {"type": "string"}, {"type": "integer"})) for index in range(many)}
    overlapping = {f"^{'a' * index}.*": {"type": "integer", "multipleOf": index + 2} for index in range(min(many, 60))}
    found = random.choice(
        (
            {"properties": kinds, "required": list(kinds), "propertyOrdering": random.choices(odd, k=5)},
            {"properties": wide, "required": random.sample(list(wide), len(wide) // 2)},
            {"properties": wide, "minProperties": many, "maxProperties": many},
            {"properties": wide, "propertyOrdering": list(reversed(wide))},
            {"required": [f"r{index}" for index in range(many)]},
            {"patternProperties": overlapping, "properties": kinds},
            {"patternProperties": {pattern(random): valid(random, 1) for _ in range(random.choice((1, 4, 30)))}},
            {
                "patternProperties": overlapping,
                "additionalProperties": {"pattern": pattern(random)},
                "minProperties": 9,
            },
        )
    )
    return {"type": "object", **found}


def wrong(random: Random) -> Schema:
    """Keywords with values of types that they do not take."""
    return {keyword: random.choice(JUNK) for keyword in random.sample(KEYWORDS, random.randint(1, 12))}


def bare(random: Random) -> Any:
    """Values that are no schema, or hardly one."""
    return random.choice(
        (True, False, None, [], [{"type": "string"}], 0, "string", {}, {"type": []}, {"not": {}}, *JUNK)
    )


def mutated(random: Random) -> Any:
    """A valid schema with a piece of it replaced by, or mixed with, something of another kind."""
    schema = valid(random, 4)
    for _ in range(random.randint(1, 3)):
        place, key = random.choice(list(_places(schema)) or [(schema, "type")])
        piece = random.choice((*SIMPLE, bare))(random)
        if isinstance(place[key], dict) and isinstance(piece, dict) and random.random() < 0.5:
            place[key] = {**place[key], **copy.deepcopy(piece)}
        else:
            place[key] = copy.deepcopy(piece)
    return schema


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def unenforced(random: Random) -> Schema:
    """Keywords that no grammar enforces, for which the answer is checked: what they hold is hostile too."""
    made = random.choice((*SIMPLE, valid, deep))
    found = valid(random, 2)
    for keyword in random.sample(APPLIED, random.randint(1, 4)):
        found[keyword] = made(random)
    for keyword in random.sample(COUNTED, random.randint(0, 2)):
        found[keyword] = random.choice((0, 1, 3, 10**9))
    if random.random() < 0.5:
        found["uniqueItems"] = True
    if random.random() < 0.3:
        found["dependentSchemas"] = {name: made(random) for name in "abc"}
    levels = random.choice((0, 1, 30))
    doubled = {f"u{level}": {"not": {"allOf": [{"$ref": f"#/$defs/u{level + 1}"}] * 2}} for level in range(levels)}
    return {**found, "$defs": {**found.get("$defs", {}), **doubled, f"u{levels}": found}, "$ref": "#/$defs/u0"}


SIMPLE: tuple[Callable[[Random], Any], ...] = (
    *(bounds, counts, divisors, several, texts, choices, references, crossed, names, wrong),
)
KINDS: dict[str, Callable[[Random], Any]] = {
    "valid": valid,
    "bounds": bounds,
    "counts": counts,
    "divisors": divisors,
    "several divisors": several,
    "patterns": texts,
    "choices": choices,
    "deep": deep,
    "references": references,
    "crossed": crossed,
    "names": names,
    "wrong types": wrong,
    "no schema": bare,
    "mutated": mutated,
    "unenforced": unenforced,
}
"""Every kind of input; each function takes the source of randomness alone."""
