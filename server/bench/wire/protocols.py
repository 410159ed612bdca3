"""The two ways to ask for a stream of text: the Gemini API's, and OpenAI's chat completions, which the peers speak."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote


@dataclass(frozen=True, slots=True)
class Call:
    """What a request asks for. ``max_tokens`` bounds the answer; ``schema`` is a JSON Schema that it must follow.

    ``hang_up_after`` is the number of arrivals of text after the first at which the client hangs up.
    """

    prompt: str
    max_tokens: int
    schema: dict[str, Any] | None = None
    hang_up_after: int | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """What one event of a stream reports; None for what it leaves out.

    ``has_text`` is whether the answer grew. ``output_tokens`` is the running total of the answer's tokens.
    """

    has_text: bool = False
    output_tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None


class Dialect(Protocol):
    """The API of a kind of server: its requests and its events."""

    name: str

    def request(self, model: str, call: Call) -> tuple[str, bytes]:
        """The path and the body of a streaming request at temperature 0."""
        ...

    def headers(self, api_key: str | None) -> dict[str, str]:
        """How the key is sent."""
        ...

    def read(self, event: bytes) -> Progress:
        """The progress in the data of a server-sent event. Raises ``ValueError`` for one that this kind never sends."""
        ...


class SseReader:
    """Server-sent events out of a body that may be cut anywhere."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that are complete with this piece."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class Gemini:
    """``streamGenerateContent``: every chunk counts the tokens so far."""

    name = "gemini"

    def request(self, model: str, call: Call) -> tuple[str, bytes]:
        """See ``Dialect``."""
        config: dict[str, Any] = {"temperature": 0, "maxOutputTokens": call.max_tokens}
        if call.schema is not None:
            config |= {"responseMimeType": "application/json", "responseJsonSchema": call.schema}
        body = {"contents": [{"role": "user", "parts": [{"text": call.prompt}]}], "generationConfig": config}
        return f"/v1beta/models/{quote(model)}:streamGenerateContent?alt=sse", json.dumps(body).encode()

    def headers(self, api_key: str | None) -> dict[str, str]:
        """See ``Dialect``."""
        return {"x-goog-api-key": api_key} if api_key else {}

    def read(self, event: bytes) -> Progress:
        """See ``Dialect``."""
        with _shape_of(event):
            chunk = json.loads(event)
            if "error" in chunk:
                return Progress(error=_error(chunk["error"]))
            candidate = (chunk.get("candidates") or [{}])[0]
            parts = candidate.get("content", {}).get("parts", [])
            usage = chunk.get("usageMetadata", {})
            answered, thought = _count(usage, "candidatesTokenCount"), _count(usage, "thoughtsTokenCount") or 0
            return Progress(
                has_text=any(part.get("text") for part in parts),
                output_tokens=None if answered is None else answered + thought,
                prompt_tokens=_count(usage, "promptTokenCount"),
                cached_tokens=_count(usage, "cachedContentTokenCount"),
                finish_reason=candidate.get("finishReason"),
            )


class OpenAi:
    """``chat/completions``: the tokens are counted once, in the last chunk, if at all."""

    name = "openai"

    def request(self, model: str, call: Call) -> tuple[str, bytes]:
        """See ``Dialect``."""
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": call.prompt}],
            "temperature": 0,
            "max_tokens": call.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if call.schema is not None:
            schema = {"name": "answer", "strict": True, "schema": call.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return "/v1/chat/completions", json.dumps(body).encode()

    def headers(self, api_key: str | None) -> dict[str, str]:
        """See ``Dialect``."""
        return {"authorization": f"Bearer {api_key}"} if api_key else {}

    def read(self, event: bytes) -> Progress:
        """See ``Dialect``."""
        if event == b"[DONE]":
            return Progress()
        with _shape_of(event):
            chunk = json.loads(event)
            if "error" in chunk:
                return Progress(error=_error(chunk["error"]))
            choice = (chunk.get("choices") or [{}])[0]
            usage = chunk.get("usage") or {}
            return Progress(
                has_text=bool((choice.get("delta") or {}).get("content")),
                output_tokens=_count(usage, "completion_tokens"),
                prompt_tokens=_count(usage, "prompt_tokens"),
                cached_tokens=_count(usage.get("prompt_tokens_details") or {}, "cached_tokens"),
                finish_reason=choice.get("finish_reason"),
            )


@contextmanager
def _shape_of(event: bytes) -> Iterator[None]:
    """Raises ``ValueError`` for an event of the wrong shape, which fails the request and not the run."""
    try:
        yield
    except (AttributeError, TypeError, LookupError):
        raise ValueError(f"an event that this API does not have: {event[:100].decode(errors='replace')}") from None


def _count(usage: dict[str, Any], name: str) -> int | None:
    number = usage.get(name)
    if number is not None and not isinstance(number, int):
        raise TypeError(name)
    return number


def _error(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)
