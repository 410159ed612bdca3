"""``castor chat``: talk to a running server through the same API as every other client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import InvalidURL
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from server.bench.wire.client import EXAMPLE_URL, parse_url
from server.config.errors import ConfigError

TIMEOUT_SECONDS = 600.0

Content = dict[str, Any]


class ChatError(Exception):
    """The server refused a turn, in its own words."""


class Client:
    """The two calls that a chat needs. Raises ``ConfigError`` where ``url`` is not a server's base URL."""

    def __init__(self, url: str, api_key: str | None) -> None:
        parse_url(url)
        self._url = url.rstrip("/")
        self._headers = {"content-type": "application/json"} | ({"x-goog-api-key": api_key} if api_key else {})

    def first_model(self) -> str:
        """The name of the first model that the server lists."""
        with self._open("/v1beta/models", None) as answer:
            models = json.load(answer).get("models", [])
        if not models:
            raise ConfigError(f"the server at {self._url} lists no model")
        return str(models[0]["name"]).removeprefix("models/")

    def stream(self, model: str, contents: list[Content]) -> Iterator[str]:
        """The pieces of the model's answer. Raises ``ChatError``."""
        path = f"/v1beta/models/{quote(model)}:streamGenerateContent?alt=sse"
        with self._open(path, json.dumps({"contents": contents}).encode()) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    yield _text_of(json.loads(line[6:]))

    def _open(self, path: str, body: bytes | None) -> Any:
        try:
            return urlopen(Request(self._url + path, body, self._headers), timeout=TIMEOUT_SECONDS)
        except HTTPError as error:
            raise ChatError(_message_of(error.read())) from None
        except (InvalidURL, UnicodeError) as error:
            raise ConfigError(f"the URL {self._url!r} is invalid: {error}; write it like {EXAMPLE_URL}") from None
        except URLError as error:
            raise ConfigError(f"no server answers at {self._url}: {error.reason}; start one: castor serve") from None


def chat(url: str, model: str | None, api_key: str | None) -> int:
    """Read turns from standard input and print the answers until it ends."""
    client = Client(url, api_key)
    try:
        name = model or client.first_model()
    except ChatError as error:
        raise ConfigError(f"the server at {url} refused: {error}") from None
    print(f"Talking to {name}. An empty line or Ctrl-D ends.")
    contents: list[Content] = []
    while line := _read_line():
        contents.append({"role": "user", "parts": [{"text": line}]})
        answer = ""
        try:
            for piece in client.stream(name, contents):
                answer += piece
                print(piece, end="", flush=True)
            print()
            contents.append({"role": "model", "parts": [{"text": answer}]})
        except (ChatError, OSError) as error:
            contents.pop()
            print(f"\n[{error}]")
    return 0


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return ""


def _text_of(chunk: dict[str, Any]) -> str:
    if "error" in chunk:
        raise ChatError(chunk["error"]["message"])
    parts = chunk["candidates"][0].get("content", {}).get("parts", []) if chunk.get("candidates") else []
    return "".join(part.get("text", "") for part in parts)


def _message_of(body: bytes) -> str:
    try:
        answer = json.loads(body)
        return str((answer[0] if isinstance(answer, list) else answer)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body.decode(errors="replace")
