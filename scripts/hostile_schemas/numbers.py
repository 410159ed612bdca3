"""Schemas of numbers and counts whose automata are as large as the numbers in them."""

from __future__ import annotations

from random import Random
from typing import Any

Schema = dict[str, Any]

DIVISORS: tuple[Any, ...] = (
    *(
        1,
        2,
        3,
        7,
        97,
        7919,
        999_983,
        10**6 + 3,
        2**31 - 1,
        2**61 - 1,
        10**18 + 9,
        2**64,
        10**40 + 63,
        10**300,
        10**4000,
    ),
    *(0.1, 0.01, 1e-9, 1e-30, 1e-300, 5e-324, 3.7, 1 / 3, 0.123456789, 1e300, 1.5e308, 2.5, 12.34567, 1e17 + 16),
    *("7", "0.001", "9" * 400, "1e-200", 0, -1, -0.0),
)
ENDS: tuple[Any, ...] = (
    *(0, 1, -1, 9, 10**9, 2**53, 2**63, -(2**63), 10**20, 10**300, 10**4000, -(10**4000), 0.1, -0.1, 1e-300, 5e-324),
    *(1.5e308, -1.5e308, 0.1000000000000001, 0.1000000000000002, 123456789.123456789, "9" * 4000, "1e308", "-0"),
)
COUNTS: tuple[Any, ...] = (
    *(
        0,
        1,
        2,
        60,
        1000,
        9_999,
        10_000,
        65_536,
        10**6,
        2**31,
        2**32,
        2**62,
        2**63 - 1,
        2**63,
        10**30,
        1e18,
        3.0,
        -1,
        2.5,
    ),
    *("9223372036854775807", "1000", "99999999999999999999"),
)


def divisors(random: Random) -> Schema:
    """``multipleOf``: huge, prime, tiny, decimal; alone or between limits."""
    found: Schema = {"type": random.choice(("integer", "number")), "multipleOf": random.choice(DIVISORS)}
    if random.random() < 0.2:
        found["multipleOf"] = random.randrange(2, 10 ** random.choice((3, 5, 8, 15, 60)))
    return found | (bounds(random) if random.random() < 0.3 else {}) | {"type": found["type"]}


def bounds(random: Random) -> Schema:
    """Limits of thousands of digits, of the smallest numbers, and the wrong way round."""
    found: Schema = {"type": random.choice(("integer", "number"))}
    for name in random.sample(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), random.randint(1, 3)):
        found[name] = random.choice(ENDS)
        if random.random() < 0.3:
            found[name] = random.randrange(10 ** random.choice((3, 30, 4000))) * random.choice((1, -1))
    return found


def counts(random: Random) -> Schema:
    """Numbers of items, characters and properties, also one within the other."""
    kinds: tuple[Schema, ...] = (
        {"type": "string"},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "string", "minLength": 99, "maxLength": 2000}},
        {"type": "array", "prefixItems": [{"type": "integer"}] * 3},
        {"type": "object", "additionalProperties": {"type": "integer"}},
    )
    found = {**random.choice(kinds)}
    things = {"string": "Length", "array": "Items", "object": "Properties"}[found["type"]]
    found |= {f"{end}{things}": random.choice(COUNTS) for end in random.sample(("min", "max"), random.randint(1, 2))}
    for _ in range(random.choice((0, 0, 0, 1, 3, 8))):
        least = random.choice((2, 30, 1000, 9999))
        found = {"type": "array", "items": found, "minItems": least, "maxItems": least}
    return found
