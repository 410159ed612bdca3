"""The requests that are spoilt: those that clients sent, as tests/data has them, made short to answer."""

from __future__ import annotations

import base64
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).resolve().parents[2] / "tests" / "data"
MODEL = "fuzzed"
"""The name that each request gets in place of the model's."""
TOKENS = 3
"""The longest answer that a request asks for, where its mutation leaves that alone."""
DROPPED_HEADERS = frozenset({"connection", "content-length", "host", "accept-encoding", "x-server-timeout"})
MORE: tuple[tuple[str, str, Any], ...] = (
    (
        "a conversation with calls",
        "generateContent",
        {
            "systemInstruction": {"parts": [{"text": "You tell the weather."}]},
            "contents": [
                {"role": "user", "parts": [{"text": "Weather in Oslo and Rome?"}]},
                {
                    "role": "model",
                    "parts": [
                        {"functionCall": {"name": "weather", "args": {"city": "Oslo"}, "id": "a"}},
                        {"functionCall": {"name": "weather", "args": {"city": "Rome"}, "id": "b"}},
                    ],
                },
                {
                    "role": "user",
                    "parts": [
                        {"functionResponse": {"name": "weather", "response": {"degrees": 4}, "id": "a"}},
                        {"functionResponse": {"name": "weather", "response": {"degrees": 21}, "id": "b"}},
                    ],
                },
            ],
            "tools": [{"functionDeclarations": [{"name": "weather", "description": "Weather of a city."}]}],
            "safetySettings": [{"category": "HARM_CATEGORY_HARASSMENT", "threshold": "BLOCK_NONE"}],
        },
    ),
    (
        "an answer by a schema",
        "streamGenerateContent?alt=sse",
        {
            "contents": [{"role": "user", "parts": [{"text": "A color and a number."}]}],
            "generationConfig": {
                "responseMimeType": "application/json",
                "responseJsonSchema": {
                    "type": "object",
                    "properties": {
                        "color": {"type": "string", "enum": ["red", "green"]},
                        "numbers": {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 3},
                    },
                    "required": ["color"],
                },
            },
        },
    ),
    (
        "all sampling fields",
        "generateContent",
        {
            "contents": [{"role": "user", "parts": [{"text": "Tell me a story."}, {"text": "A short one."}]}],
            "generationConfig": {
                "temperature": 0.9,
                "topP": 0.9,
                "topK": 40,
                "seed": 7,
                "candidateCount": 2,
                "presencePenalty": 0.2,
                "frequencyPenalty": 0.1,
                "stopSequences": ["END"],
                "responseLogprobs": True,
                "logprobs": 3,
            },
        },
    ),
    (
        "an attached document",
        "countTokens",
        {
            "contents": [
                {
                    "role": "user",
                    "parts": [{"inlineData": {"mimeType": "text/plain", "data": "SGVsbG8="}}, {"text": "What is it?"}],
                }
            ]
        },
    ),
)
"""What recorded clients did not send, or not in one request: case, method and body."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A request as it was sent; ``body`` is its JSON where it has some, else the bytes. Copies may be changed."""

    case: str
    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: Any

    @property
    def is_json(self) -> bool:
        return not isinstance(self.body, bytes)


def recorded() -> tuple[list[Recorded], list[Recorded]]:
    """The requests that reach the engine unspoilt, and all others."""
    lines = (DATA / "recorded_requests.jsonl").read_text().splitlines()
    refused = {row["case"] for row in yaml.safe_load((DATA / "refused_requests.yaml").read_text())}
    answered: list[Recorded] = []
    others: list[Recorded] = []
    for index, row in enumerate(map(json.loads, lines)):
        address, _, method = row["path"].rpartition(":")
        generates = method.partition("?")[0] in ("generateContent", "streamGenerateContent") and "models/" in address
        body = row["body"]
        if body is None:
            body = b""
        elif "__raw_len" in body:
            body = base64.b64decode(body["__raw_b64_prefix"])
        path = f"{address[: address.rfind('/')]}/{MODEL}:{method}" if generates else row["path"]
        headers = tuple((name, value) for name, value in row["headers"].items() if name.lower() not in DROPPED_HEADERS)
        made = Recorded(row["case"], row["method"], path, headers, shortened(body) if generates else body)
        reaches = generates and f"{index:02d} {row['case']}" not in refused
        (answered if reaches else others).append(made)
    for case, method, body in MORE:
        path = f"/v1beta/models/{MODEL}:{method}"
        counts = method == "countTokens"
        content_type = (("content-type", "application/json"),)
        made = Recorded(case, "POST", path, content_type, body if counts else shortened(body))
        (others if counts else answered).append(made)
    return answered, others


def shortened(body: Any) -> Any:
    """A request for a few tokens; one that names a limit under its name in snake_case keeps that name."""
    body = copy.deepcopy(body)
    config = body.setdefault("generation_config" if "generation_config" in body else "generationConfig", {})
    config["max_output_tokens" if "max_output_tokens" in config else "maxOutputTokens"] = TOKENS
    return body
