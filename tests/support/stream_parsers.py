"""How SDKs read ``streamGenerateContent?alt=sse``: the rules of their parsers, for SDKs that do not run here too.

A parser takes the body in the pieces in which it came, yields the objects that its SDK hands on, and raises
``StreamFailed`` where the SDK tells its caller that the stream failed.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Parser = Callable[[Iterable[bytes]], Iterator[dict[str, Any]]]
BLANK = re.compile(r"\n\n|\r\r|\r\n\r\n")


class StreamFailed(Exception):
    """The caller is told so; the message has the server's where the SDK passes it on."""


def _texts(pieces: Iterable[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for piece in pieces:
        yield decoder.decode(piece)


def _lines(pieces: Iterable[bytes]) -> Iterator[str]:
    """The lines, and what stands after the last break if anything does."""
    rest = ""
    for text in _texts(pieces):
        *whole, rest = (rest + text).split("\n")
        yield from whole
    if rest:
        yield rest


def _told(error: Any) -> StreamFailed:
    return StreamFailed(f"{error.get('code')} {error.get('message')}")


def go_genai(pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """googleapis/go-genai, api_client.go: what stands between empty lines must begin with ``data:``, or be an object
    with ``error``. An error in an event is an answer without candidates."""
    for token in "".join(_texts(pieces)).split("\n\n"):
        prefix, _, data = token.partition(":")
        if prefix == "data":
            yield json.loads(data)
        elif token:
            try:
                error = json.loads(token).get("error")
            except ValueError:
                error = None
            raise _told(error) if error else StreamFailed(f"invalid stream chunk: {token}")


def _anchored(pieces: Iterable[bytes], left_over: Callable[[str], StreamFailed]) -> Iterator[dict[str, Any]]:
    """Three JavaScript SDKs: an event is matched at the very beginning of what has come, and nothing may be left."""
    buffer = ""
    for text in _texts(pieces):
        buffer += text
        while event := re.match(r"data: ([^\n\r]*)(?:\n\n|\r\r|\r\n\r\n)", buffer):
            yield json.loads(event[1])
            buffer = buffer[event.end() :]
    if buffer.strip():
        raise left_over(buffer)


def firebase_js(pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """firebase/firebase-js-sdk, packages/ai/src/requests/stream-reader.ts."""
    return _anchored(pieces, lambda _: StreamFailed("Failed to parse stream"))


def old_js_sdk(pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """@google/generative-ai 0.24.1, which LangChain.js, n8n, LibreChat and Flowise use."""
    return _anchored(pieces, lambda _: StreamFailed("Failed to parse stream"))


def genkit_js(pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """@genkit-ai/google-genai 1.42.0, common/utils: it reads the error in what is left over."""

    def left_over(text: str) -> StreamFailed:
        try:
            return _told(json.loads(text)["error"])
        except (ValueError, LookupError):
            return StreamFailed("Failed to parse stream")

    return _anchored(pieces, left_over)


def python_genai(pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """google-genai 3.6.1: an event's lines are joined; other lines are collected until their braces are closed."""
    event: list[str] = []
    bare, depth = "", 0

    def loaded(text: str) -> dict[str, Any]:
        chunk: dict[str, Any] = json.loads(text)
        if "error" in chunk:
            raise _told(chunk["error"])
        return chunk

    for line in _lines(pieces):
        if not line:
            if event:
                yield loaded("\n".join(event))
            event = []
        elif line.startswith("data: "):
            event.append(line.removeprefix("data: "))
        else:
            bare += line
            outside = re.sub(r'"(?:[^"\\]|\\.)*"', "", bare)
            depth = outside.count("{") - outside.count("}")
            if depth == 0:
                yield loaded(bare)
                bare = ""
    for text in (bare, "\n".join(event)):
        if text:
            yield loaded(text)


def old_python_genai(pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """google-genai 1.60.0: every line with ``data: `` is an event of its own."""
    for line in _lines(pieces):
        if not line:
            continue
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            raise _told(chunk["error"])
        yield chunk


def _js_genai(pieces: Iterable[bytes], errors_in_events: bool) -> Iterator[dict[str, Any]]:
    buffer = ""

    def look_for_an_error(text: str) -> None:
        try:
            error = json.loads(text)["error"]
        except (ValueError, LookupError, TypeError):
            return
        raise _told(error)

    for text in _texts(pieces):
        look_for_an_error(text)
        buffer += text
        while end := BLANK.search(buffer):
            event, buffer = buffer[: end.start()].strip(), buffer[end.end() :]
            if event.startswith("data:"):
                data = event.removeprefix("data:").strip()
                if errors_in_events:
                    look_for_an_error(data)
                yield json.loads(data)
    if buffer.strip():
        raise StreamFailed("Incomplete JSON segment at the end")


def js_genai(pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """@google/genai 3.1.0: an error is looked for in each piece of the body, and in each event."""
    return _js_genai(pieces, errors_in_events=True)


def old_js_genai(pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """@google/genai before it read errors in events (googleapis/js-genai#461): only a bare one is seen."""
    return _js_genai(pieces, errors_in_events=False)


def java_genai(pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """googleapis/java-genai, ResponseStream.java: an event's ``data`` fields are joined, all other lines are skipped.
    It reads one event ahead of the one that it hands on."""
    event: list[str] = []
    for line in [*_lines(pieces), ""]:
        if line:
            field, _, value = line.partition(":")
            if field == "data":
                event.append(value.removeprefix(" "))
            continue
        if event:
            chunk = json.loads("\n".join(event))
            event = []
            if "error" in chunk:
                raise _told(chunk["error"])
            yield chunk


def ai_sdk(pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """@ai-sdk/google 4.0.121 on eventsource-parser: lines without a known field are skipped, as is an event that no
    empty line has ended; ``error`` in an event becomes a part of its own kind in the caller's stream."""
    event: list[str] = []
    rest = ""
    for text in _texts(pieces):
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            field, _, value = line.partition(":")
            if field == "data":
                event.append(value.removeprefix(" "))
            if not line and event:
                chunk = json.loads("\n".join(event))
                event = []
                if chunk.get("error") is not None:
                    raise _told(chunk["error"])
                yield chunk


PARSERS: tuple[Parser, ...] = (
    go_genai,
    firebase_js,
    old_js_sdk,
    genkit_js,
    python_genai,
    old_python_genai,
    js_genai,
    old_js_genai,
    java_genai,
    ai_sdk,
)
