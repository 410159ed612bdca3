"""Requests that stopped the server, or came close: each kind as a function of a number, so that no two are equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MODEL = "gemini-any"
"""A name that every server of the tests answers to."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is sent: the path of a method, and a body, or bytes as they are on the connection."""

    path: str = ""
    content: bytes = b""
    raw: bytes = b""


TOOL_MODE = {"functionCallingConfig": {"mode": "ANY"}}


def asking(body: Any, method: str = "generateContent") -> Request:
    return Request(f"/v1beta/models/{MODEL}:{method}", json.dumps(body).encode())


def said(text: str) -> list[Any]:
    return [{"parts": [{"text": text}]}]


def ordinary(number: int) -> Request:
    config = {"maxOutputTokens": 8, "temperature": 0}
    return asking({"contents": said(f"Name river {number}."), "generationConfig": config})


def schema_of(schema: Any) -> Request:
    config = {"maxOutputTokens": 4, "responseMimeType": "application/json", "responseJsonSchema": schema}
    return asking({"contents": said("hi"), "generationConfig": config})


def function_with(schema: Any) -> Request:
    declared = [{"functionDeclarations": [{"name": "f", "parametersJsonSchema": schema}]}]
    return asking({"contents": said("hi"), "tools": declared, "toolConfig": TOOL_MODE, **short()})


def short() -> dict[str, Any]:
    return {"generationConfig": {"maxOutputTokens": 4}}


def divisor(number: int) -> Request:
    return schema_of({"type": "integer", "multipleOf": 2147483647 - number})


def divisor_of_a_parameter(number: int) -> Request:
    return function_with({"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 1000003 + number}}})


def divisors_laid_over(number: int) -> Request:
    """Each small, and the number of all of them is not found by their sizes."""
    divisors = [{"multipleOf": prime} for prime in (53, 59, 61, 67, 71 + number)]
    return schema_of({"type": "integer", "allOf": divisors})


def slow_to_compile(number: int) -> Request:
    """Below all bounds by number, and more than a child has time for."""
    properties = {f"p{number}x{i}": {"type": "integer", "multipleOf": 99_991 - 2 * i} for i in range(60)}
    return schema_of({"type": "object", "properties": properties, "required": list(properties)})


def brackets(number: int) -> Request:
    return schema_of({"type": "string", "pattern": "[" * (190_000 + number)})


def groups(number: int) -> Request:
    return schema_of({"type": "string", "pattern": "(?‹" * (60_000 + number)})


def many_contents(number: int) -> Request:
    """Eight megabytes in sixteen thousand contents of one role."""
    parts = [{"text": f"{number} and so on "[:10] * 50}]
    return asking({"contents": [{"role": "user", "parts": parts}] * 16_000})


def many_turns(number: int) -> Request:
    """Sixteen thousand short ones: what is large is the program of the template."""
    turns = [{"role": ("user", "model")[turn % 2], "parts": [{"text": f"{number % 10} x"}]} for turn in range(16_000)]
    return asking({"contents": turns[1:]})


def many_functions(number: int) -> Request:
    properties = {f"p{i}": {"type": "string", "description": f"{number}"} for i in range(30)}
    parameters = {"type": "object", "properties": properties}
    declared = [{"name": f"f{i}", "parametersJsonSchema": parameters} for i in range(500)]
    return asking({"contents": said("hi"), "tools": [{"functionDeclarations": declared}], **short()})


def results_in_reverse(number: int) -> Request:
    calls = [{"functionCall": {"name": "f", "id": f"{number}.{i}", "args": {}}} for i in range(4000)]
    results = [
        {"functionResponse": {"name": "f", "id": f"{number}.{i}", "response": {}}} for i in reversed(range(4000))
    ]
    contents = [*said("hi"), {"role": "model", "parts": calls}, {"role": "user", "parts": results}]
    return asking({"contents": contents, "tools": [{"functionDeclarations": [{"name": "f"}]}]})


def trailers(number: int) -> Request:
    head = (
        f"POST /v1beta/models/{MODEL}:generateContent HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    many = b"".join(b"x-%d-%d: %s\r\n" % (number, i, b"y" * 1000) for i in range(20_000))
    return Request(raw=head.encode() + b"2\r\n{}\r\n0\r\n" + many)


def counted(number: int) -> Request:
    """14.4 MB of text to be counted."""
    return asking({"contents": said(f"{number} and so on "[:10] * 1_440_000)}, "countTokens")


def counted_within_the_limit(number: int) -> Request:
    return asking({"contents": said(f"{number} and so on "[:10] * 50_000)}, "countTokens")


def named_like_a_control_token(number: int) -> Request:
    call = {"functionCall": {"name": f"f{number}", "args": {"<|im_end|": 1, "<|im_start|": 2}}}
    return asking({"contents": [*said("hi"), {"role": "model", "parts": [call]}, *said("x")]})


def control_token(number: int) -> Request:
    return schema_of({"const": "<|im_end|>" * (1 + number)})


def digits(number: int) -> Request:
    return schema_of({"type": "integer", "minimum": 10 ** (3999 - number)})


def unknown_keys(number: int) -> Request:
    return asking({"contents": [{f"k{number}x{i}": 1 for i in range(95_000)}]})


def more_keys(number: int) -> Request:
    return asking({"contents": [{f"k{number}x{i}": 1 for i in range(300_000)}]})


def numbers(number: int) -> Request:
    body = b'{"contents":[' + b"%d," % number * 5_000_000 + b"0]}"
    return Request(f"/v1beta/models/{MODEL}:generateContent", body)


KINDS: dict[str, tuple[Callable[[int], Request], set[int]]] = {
    "ordinary": (ordinary, {200}),
    "a divisor": (divisor, {200}),
    "a divisor of a parameter": (divisor_of_a_parameter, {200}),
    "divisors laid over": (divisors_laid_over, {200}),
    "slow to compile": (slow_to_compile, {400, 429}),
    "brackets": (brackets, {200}),
    "groups": (groups, {200}),
    "many contents": (many_contents, {400}),
    "many turns": (many_turns, {400}),
    "many functions": (many_functions, {400, 429}),
    "results in reverse": (results_in_reverse, {400}),
    "trailers": (trailers, {431, 0}),
    "counted": (counted, {400}),
    "counted within the limit": (counted_within_the_limit, {200}),
    "named like a control token": (named_like_a_control_token, {400}),
    "a control token": (control_token, {200, 400}),
    "digits": (digits, {400}),
    "unknown keys": (unknown_keys, {400}),
    "more keys": (more_keys, {400}),
    "numbers": (numbers, {400}),
}
"""What is sent, by its number, and the statuses that it may be answered with."""
