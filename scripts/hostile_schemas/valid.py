"""Random schemas as people write them, in JSON Schema; the hostile ones are mutations of them."""

from __future__ import annotations

from random import Random
from typing import Any

from hostile_schemas.patterns import HARMLESS

Schema = dict[str, Any]

NAMES = ("name", "qty", "é", "a b", 'quo"te', "type", "items", "x-1", "\\", "größe", "in_stock", "$ref", "properties")
FORMATS = ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid", "made-up")
TEXTS = ("red", "green", "a/b", "é", "", "null", 'say "hi"', "1", "\n")


def valid(random: Random, levels: int = 3) -> Schema:
    """A schema of at most ``levels`` levels."""
    leaves = (_text, _number, _whole, _choice, _bare, _constant)
    inner = (_object, _object, _array, _any, _tuple, _map)
    if levels <= 1 or random.random() < 0.4:
        found = random.choice(leaves)(random)
    else:
        found = random.choice(inner)(random, levels - 1)
    if random.random() < 0.2:
        found |= {"title": "T", "description": "what it is"}
    return found


def _text(random: Random) -> Schema:
    least = random.randrange(7)
    return {
        "type": "string",
        **random.choice(
            (
                {"minLength": least, "maxLength": least + random.randrange(7)},
                {"pattern": random.choice(HARMLESS)},
                {"format": random.choice(FORMATS)},
                {},
            )
        ),
    }


def _number(random: Random) -> Schema:
    low = random.choice((-10, -0.5, 0, 1.25))
    return {"type": "number", "minimum": low, "maximum": low + random.choice((1, 2.5, 100))}


def _whole(random: Random) -> Schema:
    low = random.randrange(-500, 500)
    found: Schema = {"type": "integer", "minimum": low, "maximum": low + random.randrange(200)}
    return found | random.choice(({}, {}, {"multipleOf": random.choice((2, 5, 7, 10))}))


def _choice(random: Random) -> Schema:
    return {"type": "string", "enum": random.sample(TEXTS, random.randint(1, 4))}


def _bare(random: Random) -> Schema:
    return {"type": random.choice(("boolean", "null", "string", "integer", "number", ["string", "null"]))}


def _constant(random: Random) -> Schema:
    return {"const": random.choice((None, True, 7, -2.5, "x", {"a": [1, None]}, []))}


def _object(random: Random, levels: int) -> Schema:
    names = random.sample(NAMES, random.randint(1, 4))
    found: Schema = {"type": "object", "properties": {name: valid(random, levels) for name in names}}
    if random.random() < 0.5:
        found["required"] = [name for name in names if random.random() < 0.5]
    if random.random() < 0.3:
        found["additionalProperties"] = random.choice((True, False, valid(random, 1)))
    if random.random() < 0.3:
        found["propertyOrdering"] = random.sample(names, len(names))
    return found


def _array(random: Random, levels: int) -> Schema:
    least = random.randrange(3)
    return {"type": "array", "items": valid(random, levels), "minItems": least, "maxItems": least + random.randrange(3)}


def _any(random: Random, levels: int) -> Schema:
    return {
        random.choice(("anyOf", "anyOf", "oneOf", "allOf")): [
            valid(random, levels) for _ in range(random.randint(1, 3))
        ]
    }


def _tuple(random: Random, levels: int) -> Schema:
    return {"type": "array", "prefixItems": [valid(random, levels) for _ in range(2)], "items": False}


def _map(random: Random, levels: int) -> Schema:
    return {"type": "object", "patternProperties": {"^[a-z]$": valid(random, levels)}, "additionalProperties": False}
