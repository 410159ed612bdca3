"""What the server writes on a stream, byte for byte, read by the rules of the SDKs' parsers in every chunking."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from support import stream_parsers
from support.stream_parsers import PARSERS, Parser, StreamFailed

CHUNKS = [{"c": text} for text in ('"\\n"', "{é}")]
ERROR = {"error": {"code": 504, "message": "{"}}
FIRST, SECOND = (f"data: {json.dumps(chunk)}\n\n" for chunk in CHUNKS)
FAILED = f"data: {json.dumps(ERROR)}\n\n{json.dumps(ERROR)}"
WHOLE = {
    "without a silence": FIRST + SECOND,
    "a silence before the first event": FIRST.replace("data: ", "data:    ") + SECOND,
    "a silence between events": FIRST + SECOND.replace("data: ", "data:    "),
}
BROKEN = {
    "an error after an event": FIRST + FAILED,
    "an error that continues a begun event": FIRST + FAILED.replace("data: ", "data:    "),
    "an error and nothing before it": FAILED.replace("data: ", "data:   "),
}
UNREADABLE_ERROR = {"firebase_js": "Failed to parse stream", "old_js_sdk": "Failed to parse stream"}
"""What is told in place of the server's message."""


def chunkings(text: str) -> Iterator[list[bytes]]:
    """In one piece, in every way in two and three, and byte by byte."""
    body = text.encode()
    for first in range(len(body)):
        for second in range(first + 1, len(body) + 1):
            yield [piece for piece in (body[:first], body[first:second], body[second:]) if piece]
    yield [body[at : at + 1] for at in range(len(body))]


def heard(parser: Parser, pieces: list[bytes]) -> tuple[list[Any], str]:
    """The answers that the caller gets, and how it is told of a failure; "" where it is not."""
    answers = []
    try:
        for chunk in parser(pieces):
            # Some hand on the event of the error too: an answer without candidates.
            if chunk != ERROR:
                answers.append(chunk)
    except StreamFailed as failure:
        return answers, str(failure)
    return answers, ""


@pytest.mark.parametrize("stream", WHOLE)
@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.__name__)
def test_answers_arrive(parser: Parser, stream: str) -> None:
    for pieces in chunkings(WHOLE[stream]):
        assert heard(parser, pieces) == (CHUNKS, ""), pieces


@pytest.mark.parametrize("stream", BROKEN)
@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.__name__)
def test_failures_are_told(parser: Parser, stream: str) -> None:
    before = CHUNKS[:1] if BROKEN[stream].startswith(FIRST) else []
    expected = {UNREADABLE_ERROR.get(parser.__name__, "504 {")}
    if parser is stream_parsers.old_js_genai:
        # It reads what is left over only where that is a piece of its own.
        expected.add("Incomplete JSON segment at the end")
    for pieces in chunkings(BROKEN[stream]):
        answers, failure = heard(parser, pieces)
        assert (answers, failure in expected) == (before, True), (failure, pieces)


@pytest.mark.parametrize(
    ("stream", "trips"),
    [
        # An empty line between events, and a comment, the fillers of other servers.
        (FIRST + "\n" + SECOND, {"go_genai", "firebase_js", "old_js_sdk", "genkit_js"}),
        (
            FIRST + ": ping\n\n" + SECOND,
            {"go_genai", "firebase_js", "old_js_sdk", "genkit_js", "python_genai", "old_python_genai"},
        ),
        # Either form of an error alone reaches only some.
        (
            FIRST + f"data: {json.dumps(ERROR)}\n\n",
            {"python_genai", "old_python_genai", "js_genai", "java_genai", "ai_sdk"},
        ),
        (FIRST + json.dumps(ERROR), {parser.__name__ for parser in PARSERS} - {"java_genai", "ai_sdk"}),
    ],
    ids=["an empty line", "a comment", "only the event", "only the bare object"],
)
def test_no_simpler_form_would_do(stream: str, trips: set[str]) -> None:
    failed = set()
    for parser in PARSERS:
        try:
            told = heard(parser, [stream.encode()])[1]
        except ValueError:
            told = "not JSON"
        failed |= {parser.__name__} if told else set()
    assert failed == trips
