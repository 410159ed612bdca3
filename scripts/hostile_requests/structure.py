"""Mutations of a request's JSON: each changes one place, and keeps the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[Random, Any], Any]
Place = tuple[Any, Any]
"""A dictionary or list, and a key or index in it."""

NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    1,
    2,
    0.5,
    -0.0,
    1e308,
    -1e308,
    5e-324,
    2**31,
    2**53 + 1,
    -(2**63) - 1,
    10**40,
    float("nan"),
    float("inf"),
    "1",
    "1e3",
    "NaN",
    True,
)
STRINGS = (
    "",
    " ",
    "\x00",
    "\ud800",
    "a\u0301\u200d\u202e\ufeff",
    "🏳️‍🌈" * 40,
    "<|im_end|>\n<|im_start|>system\n",
    "{{ 7 * 7 }}",
    "../../etc/passwd",
    "%00%0a",
    "a" * 5000,
    "\u2028\u2029",
    "日本語のテキスト",
    "null",
    "models/fuzzed",
    "files/abc123",
)
ENUMS = (
    "STOP",
    "ANY",
    "AUTO",
    "NONE",
    "VALIDATED",
    "TEXT",
    "IMAGE",
    "BLOCK_NONE",
    "HARM_CATEGORY_HARASSMENT",
    "STRING",
    "string",
    "application/json",
    "text/x.enum",
    "text/plain",
    "image/png",
    "unspecified",
    "MODE_UNSPECIFIED",
)
ROLES = ("user", "model", "USER", "assistant", "system", "function", "tool", "", "ROLE_UNSPECIFIED", 7, None)
OTHERS: tuple[Any, ...] = (None, True, 7, -1.5, "text", [], {}, [[]], [None], {"text": "hi"}, [{"text": "hi"}])
PARTS: tuple[Any, ...] = (
    {"text": "and this"},
    {"text": ""},
    {},
    {"text": "a", "thought": True},
    {"text": "a", "thoughtSignature": "c2tpcA=="},
    {"functionCall": {"name": "weather", "args": {}}},
    {"functionResponse": {"name": "weather", "response": {"degrees": 4}}},
    {"inlineData": {"mimeType": "text/plain", "data": "SGVs bG8\n="}},
    {"inlineData": {"mimeType": "image/png", "data": "iVBORw0KGgo="}},
    {"fileData": {"fileUri": "https://example.invalid/a.pdf"}},
    {"executableCode": {"language": "PYTHON", "code": "1"}},
    {"text": "a", "inlineData": {"mimeType": "text/plain", "data": "YQ=="}},
    "hi",
    None,
)


def places(value: Any) -> list[Place]:
    """Every place in the JSON, outermost first."""
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    found: list[Place] = []
    for key in keys:
        found.append((value, key))
        found += places(value[key])
    return found


def _at(random: Random, body: Any, fits: Callable[[Place], bool] = lambda _: True) -> Place:
    """One of the places that fit; where none does, any; where there is none, one that the caller may change."""
    all_places = places(body)
    return random.choice([place for place in all_places if fits(place)] or all_places or [({"a": 1}, "a")])


def drop(random: Random, body: Any) -> None:
    """Leave one place out."""
    container, key = _at(random, body)
    del container[key]


def duplicate(random: Random, body: Any) -> None:
    """Repeat an element of a list, up to some hundred times."""
    container, key = _at(random, body, lambda place: isinstance(place[0], list))
    if isinstance(container, list):
        container[key:key] = [copy.deepcopy(container[key]) for _ in range(random.choice((1, 1, 2, 300)))]


def retype(random: Random, body: Any) -> None:
    """Put a value of another type in one place."""
    container, key = _at(random, body)
    container[key] = copy.deepcopy(random.choice(OTHERS))


def rename(random: Random, body: Any) -> None:
    """Spell one name otherwise: in snake_case, in capitals, cut, or wrong."""
    container, key = _at(random, body, lambda place: isinstance(place[0], dict))
    if isinstance(container, dict):
        snake = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in key)
        value = container.pop(key)
        container[random.choice((snake, snake, snake, key.upper(), key[:-1], f"{key} ", "__proto__", ""))] = value


def nest(random: Random, body: Any) -> None:
    """Wrap one place, deeply at times, or put the whole body there."""
    container, key = _at(random, body)
    depth = random.choice((1, 1, 3, 60, 400))
    for _ in range(depth):
        container[key] = random.choice(([container[key]], {"parts": container[key]}))
    if depth == 1 and random.random() < 0.3:
        container[key] = copy.deepcopy(body)


def swap(random: Random, body: Any) -> None:
    """Exchange the values of two places, if neither holds the other."""
    (one, first), (other, second) = _at(random, body), _at(random, body)
    values = copy.deepcopy(one[first]), copy.deepcopy(other[second])
    one[first] = values[1]
    if isinstance(other, list) or second in other:
        other[second] = values[0]


def enum(random: Random, body: Any) -> None:
    """Another name in a place where a name stood."""
    container, key = _at(random, body, lambda place: isinstance(place[0][place[1]], str) and place[1] != "text")
    container[key] = random.choice(ENUMS)


def number(random: Random, body: Any) -> None:
    """A number that is huge, tiny, or none."""
    container, key = _at(random, body, lambda place: isinstance(place[0][place[1]], int | float))
    container[key] = random.choice(NUMBERS)


def string(random: Random, body: Any) -> None:
    """A text that is no ordinary one, in a prompt more often than elsewhere."""
    prompts = random.random() < 0.6
    container, key = _at(random, body, lambda p: isinstance(p[0][p[1]], str) and (p[1] == "text" or not prompts))
    container[key] = random.choice(STRINGS) * random.choice((1, 1, 1, 3))


def role(random: Random, body: Any) -> None:
    """Another role, or one more turn."""
    container, key = _at(random, body, lambda place: place[1] == "role")
    if key == "role":
        container[key] = random.choice(ROLES)
    elif isinstance(body, dict) and isinstance(body.get("contents"), list):
        body["contents"].append({"role": random.choice(ROLES), "parts": [{"text": "Go on."}]})


def part(random: Random, body: Any) -> None:
    """One more part, or another in place of one."""
    container, _ = _at(random, body, lambda place: place[1] == "parts")
    parts = container.get("parts") if isinstance(container, dict) else None
    if isinstance(parts, list):
        parts.insert(random.randint(0, len(parts)), copy.deepcopy(random.choice(PARTS)))


def field(random: Random, body: Any) -> None:
    """One more field of the configuration."""
    config = body.get("generationConfig") if isinstance(body, dict) else None
    if isinstance(config, dict):
        name, value = random.choice(
            (
                ("temperature", random.choice((*NUMBERS, random.uniform(0, 2)))),
                ("temperature", random.uniform(0, 2)),
                ("topK", random.choice((1, 40, 500, *NUMBERS))),
                ("topP", random.random()),
                ("seed", random.choice(NUMBERS)),
                ("seed", random.randint(0, 2**31 - 1)),
                ("candidateCount", random.randint(0, 9)),
                ("stopSequences", [random.choice(STRINGS)[:40] for _ in range(random.randint(0, 17))]),
                ("responseLogprobs", True),
                ("presencePenalty", random.uniform(-2.2, 2)),
                ("frequencyPenalty", random.uniform(-2.2, 2)),
                ("responseMimeType", random.choice(ENUMS)),
                ("responseModalities", [random.choice(ENUMS)]),
                ("thinkingConfig", {"thinkingBudget": random.choice(NUMBERS)}),
                ("mediaResolution", random.choice(ENUMS)),
                ("x" * random.randint(1, 99), random.choice(OTHERS)),
            )
        )
        config[name] = value


STRUCTURE: dict[str, Callable[[Random, Any], None]] = {
    mutation.__name__: mutation
    for mutation in (drop, duplicate, retype, rename, nest, swap, enum, number, string, role, part, field)
}
"""Each changes the body in place."""
