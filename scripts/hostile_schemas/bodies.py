"""Numbered requests: the same seed and number always give the same bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from hostile_schemas.kinds import CONTROL, KINDS

CARRIERS = (
    *("responseSchema", "responseSchema", "responseJsonSchema", "responseJsonSchema", "enum", "responseFormat"),
    *("parameters", "parametersJsonSchema"),
)
"""The fields that can carry a schema; those of functions once, because schemas there are weakened, not refused."""
ANSWER = {"maxOutputTokens": 8, "temperature": 0}
NAMES = ("look_up", "f", "a.b:c-d", "_" * 128, "x" * 129, "", "1st", "<|im_end|>", "é", "call\n", "look up")


@dataclass(frozen=True, slots=True)
class Body:
    """One request: its number, the kind of schema, the field that carries it, and its bytes."""

    number: int
    kind: str
    carrier: str
    content: bytes

    def __str__(self) -> str:
        return f"input {self.number} ({self.kind} in {self.carrier}, {len(self.content)} bytes)"


def body(seed: int, number: int) -> Body:
    """The request with this number."""
    random = Random(f"{seed}/{number}")
    kind = random.choice(list(KINDS))
    carrier = random.choice(CARRIERS)
    schema = KINDS[kind](random)
    said: dict[str, Any] = {
        "contents": [{"role": "user", "parts": [{"text": "Answer."}]}],
        "generationConfig": {**ANSWER},
    }
    if carrier.startswith("parameters"):
        declared = []
        for index in range(random.choice((1, 1, 1, 2, 3, 12))):
            declared.append(_function(random, carrier, schema if index == 0 else KINDS[kind](random)))
        said["tools"] = [{"functionDeclarations": declared}]
        mode = random.choice(("AUTO", "ANY", "ANY", "VALIDATED"))
        said["toolConfig"] = {"functionCallingConfig": {"mode": mode}}
    elif carrier == "responseFormat":
        response_format = {"text": {"mimeType": "APPLICATION_JSON", "schema": schema}}
        said["generationConfig"]["responseFormat"] = response_format
    elif carrier == "enum":
        field = random.choice(("responseSchema", "responseJsonSchema"))
        said["generationConfig"] |= {"responseMimeType": "text/x.enum", field: schema}
    else:
        said["generationConfig"] |= {"responseMimeType": "application/json", carrier: schema}
    return Body(number, kind, carrier, json.dumps(said).encode())


def _function(random: Random, carrier: str, schema: Any) -> dict[str, Any]:
    """A declaration; in one of four the schema is that of one of several parameters."""
    name = random.choice(NAMES) if random.random() < 0.1 else f"function_{random.randrange(10**6)}"
    if random.random() < 0.25:
        schema = {"type": "object", "properties": {"q": schema, "r": {"type": "string"}}, "required": ["q"]}
    description = random.choice(("", "What it does.", *CONTROL, "long " * 100))
    return {"name": name, "description": description, carrier: schema}
