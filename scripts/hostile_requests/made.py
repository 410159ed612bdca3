"""Request number N of a seed: one recorded request, spoilt in one place."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from random import Random

from hostile_requests.recorded import recorded
from hostile_requests.structure import STRUCTURE
from hostile_requests.wire import BYTES, Wire

ANSWERED, OTHERS = recorded()
OF_THE_ENGINE = 0.9
"""The share of the requests that reach the engine unspoilt."""
FREQUENT = ("field", "role", "string", "duplicate", "header")
OFTEN = ("part", "number", "insert", "packed", "path")
SELDOM = ("nest", "flip", "truncate", "method")
WEIGHTS = dict.fromkeys(FREQUENT, 3.0) | dict.fromkeys(OFTEN, 1.7) | dict.fromkeys(SELDOM, 0.5)
"""How often a mutation is chosen; 1 where nothing is said. Those after which a server may still answer come more often:
what a parser refuses says nothing about what stands behind it."""
JSON_KINDS, BYTE_KINDS = list(STRUCTURE), list(BYTES)


@dataclass(frozen=True, slots=True)
class Made:
    """What is sent; ``kind`` is the mutation."""

    number: int
    case: str
    kind: str
    content: bytes

    def __str__(self) -> str:
        return f"{self.number} ({self.kind} of {self.case!r})"


def made(seed: int, number: int) -> Made:
    """The same for the same seed and number, on every machine."""
    random = Random(f"{seed}/{number}")
    base = random.choice(ANSWERED if random.random() < OF_THE_ENGINE else OTHERS)
    kinds = [*JSON_KINDS, *BYTE_KINDS] if base.is_json else BYTE_KINDS
    kind = random.choices(kinds, [WEIGHTS.get(name, 1.0) for name in kinds])[0]
    content: bytes = base.body
    if base.is_json:
        body = copy.deepcopy(base.body)
        if kind in STRUCTURE:
            STRUCTURE[kind](random, body)
        # Half of them not escaped: bytes of UTF-8 are spoilt in other ways than its escapes.
        plain = random.random() < 0.5
        content = json.dumps(body, ensure_ascii=not plain).encode("utf-8", "surrogatepass")
    wire = Wire(base.method, base.path, list(base.headers), content)
    if kind in BYTES:
        BYTES[kind](random, wire)
    return Made(number, base.case, kind, wire.content())
