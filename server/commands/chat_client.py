"""The few calls of the Gemini API that a chat needs, over urllib: any server that speaks it will do.

What goes wrong is one sentence: ``ConfigError`` where there is nothing to talk to, ``ChatError`` where a call failed.
"""

from __future__ import annotations

import base64
import json
import mimetypes
import ssl
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener

from server.bench.wire.client import EXAMPLE_URL, parse_url
from server.commands.terminal import castor_command, os_sentence
from server.config.errors import ConfigError, did_you_mean
from server.config.settings import is_loopback

TIMEOUT_SECONDS = 600.0
DEFAULT_PORT = 8080
INLINE_BYTES = 256 * 1024
"""A file up to this size goes with each request, a larger one is uploaded once."""
SNIFFED_BYTES = 65536
INCOMPLETE = "the connection ended before the answer was complete"

Json = dict[str, Any]


class ChatError(Exception):
    """A call failed; in the server's own words, if it had any."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a GenerateContentResponse says of its first candidate: texts, each with whether it is a thought; why the
    answer ends, if it does; the counts of tokens so far."""

    texts: tuple[tuple[str, bool], ...]
    reason: str
    usage: Json


class Client:
    """One server. Raises ``ConfigError`` where ``url`` is not a server's base URL; ``localhost:8080`` is one too."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = base_url(url)
        self._key = {"x-goog-api-key": api_key} if api_key else {}
        direct = is_loopback(urlsplit(self.url).hostname or "")  # a proxy does not reach this machine
        self._opener: OpenerDirector = build_opener(ProxyHandler({})) if direct else build_opener()

    def model(self, name: str | None) -> Json:
        """The Model of that name or alias, or the first that the server lists."""
        if name is None:
            listed = self._models()
            if not listed:
                raise ConfigError(f"the server at {self.url} lists no model")
            return listed[0]
        try:
            found = self._json(f"/v1beta/models/{quote(name)}")
        except ChatError as error:
            known = [str(model.get("name", "")).removeprefix("models/") for model in self._models()]
            if name in known:
                raise ConfigError(f"the server at {self.url} refused: {error}") from None
            has = f"it has {', '.join(known)}" if known else "it lists none"
            raise ConfigError(
                f"the server at {self.url} has no model {name!r}{did_you_mean(name, known)}; {has}"
            ) from None
        if not isinstance(found.get("name"), str):
            raise self._foreign()
        return found

    def _models(self) -> list[Json]:
        try:
            found = self._json("/v1beta/models").get("models", [])
        except ChatError as error:
            raise ConfigError(f"the server at {self.url} refused: {error}") from None
        if not isinstance(found, list) or not all(isinstance(model, dict) and "name" in model for model in found):
            raise self._foreign()
        return found

    def stream(self, model: str, body: Json) -> Generator[Chunk]:
        """An answer as it comes. Raises ``ChatError``, also where it does not come to its end."""
        reason = ""
        path = f"/v1beta/models/{quote(model)}:streamGenerateContent?alt=sse"
        with self._open(path, json.dumps(body).encode()) as answer:
            try:
                for event in events(answer):
                    chunk = chunk_of(event)
                    reason = reason or chunk.reason
                    yield chunk
            except (OSError, HTTPException, ValueError):
                raise ChatError(INCOMPLETE) from None
            except (LookupError, TypeError, AttributeError):
                raise self._foreign("an event") from None
        if not reason:
            raise ChatError(INCOMPLETE)

    def file_part(self, model: str, path: Path) -> Json:
        """A part for the file at ``path``, which the server has agreed to read. Raises ``ConfigError``."""
        try:
            with path.open("rb") as file:
                size, head = path.stat().st_size, file.read(SNIFFED_BYTES)
                file.seek(0)
                kind = "text/plain" if _is_text(head) else mimetypes.guess_type(path.name)[0]
                kind = kind or "application/octet-stream"
                if size > INLINE_BYTES:
                    part: Json = {
                        "fileData": {"mimeType": kind, "fileUri": self._uploaded(file, path.name, size, kind)}
                    }
                else:
                    part = {"inlineData": {"mimeType": kind, "data": base64.b64encode(file.read()).decode()}}
            self._json(f"/v1beta/models/{quote(model)}:countTokens", {"contents": [{"parts": [part]}]})
        except ChatError as error:
            raise ConfigError(f"{path} cannot be used: {error}") from None
        except OSError as error:
            raise ConfigError(os_sentence(error)) from None
        return part

    def _uploaded(self, file: BinaryIO, name: str, size: int, kind: str) -> str:
        """The URI of a file, uploaded in one piece by the resumable protocol."""
        announced = {
            "protocol": "resumable",
            "command": "start",
            "header-content-length": size,
            "header-content-type": kind,
        }
        headers = {f"x-goog-upload-{field}": str(value) for field, value in announced.items()}
        body = json.dumps({"file": {"displayName": name}}).encode()
        with self._open("/upload/v1beta/files", body, headers) as answer:
            place = answer.headers.get("x-goog-upload-url") or ""
        parts = urlsplit(place)
        headers = {
            "x-goog-upload-command": "upload, finalize",
            "x-goog-upload-offset": "0",
            "content-length": str(size),
        }
        with self._open(f"{parts.path}?{parts.query}", file, headers) as answer:
            return str(self._read(answer)["file"]["uri"])

    def delete_file(self, uri: str) -> None:
        """Remove an upload; one that cannot be removed expires by itself."""
        try:
            self._json(f"/v1beta/files/{uri.rpartition('/')[2]}", method="DELETE")
        except (ChatError, ConfigError):
            return

    def _json(self, path: str, body: Json | None = None, method: str | None = None) -> Json:
        with self._open(path, None if body is None else json.dumps(body).encode(), method=method) as answer:
            return self._read(answer)

    def _read(self, answer: HTTPResponse) -> Json:
        try:
            found = json.loads(answer.read())
        except (OSError, HTTPException, ValueError):
            raise self._foreign() from None
        if not isinstance(found, dict):
            raise self._foreign()
        return found

    @contextmanager
    def _open(
        self, path: str, body: bytes | BinaryIO | None, headers: Json | None = None, method: str | None = None
    ) -> Iterator[HTTPResponse]:
        fields = {"content-type": "application/json", **self._key, **(headers or {})}
        try:
            answer = self._opener.open(Request(self.url + path, body, fields, method=method), timeout=TIMEOUT_SECONDS)
        except HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except (InvalidURL, UnicodeError) as error:
            raise ConfigError(f"the URL {self.url!r} is invalid: {error}; write it like {EXAMPLE_URL}") from None
        except (URLError, OSError, HTTPException, ValueError) as error:
            raise self._unanswered(error) from None
        with answer:
            yield answer

    def _refusal(self, error: HTTPError) -> Exception:
        """The error of an answer that is none, in the server's words if these are Gemini's."""
        try:
            found = json.loads(error.read())
            return ChatError(str((found[0] if isinstance(found, list) else found)["error"]["message"]))
        except (OSError, HTTPException, ValueError, LookupError, TypeError):
            return self._foreign(f"HTTP {error.code}")

    def _unanswered(self, error: Exception) -> ConfigError:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, ssl.SSLError):
            return ConfigError(f"no TLS with {self.url}: {reason.reason or reason}; does it speak http:// instead?")
        if isinstance(reason, HTTPException | ConnectionResetError | ValueError):
            return self._foreign()
        said = (reason.strerror or str(reason)) if isinstance(reason, OSError) else str(reason)
        return ConfigError(f"no server answers at {self.url}: {said}; start one with `{castor_command()} serve`")

    def _foreign(self, what: str = "what it says") -> ConfigError:
        return ConfigError(
            f"the server at {self.url} does not speak the Gemini API ({what} is no answer of it); is it Castor's URL?"
        )


def base_url(text: str) -> str:
    """A base URL as users write it, with ``http://`` and Castor's port where they leave them out."""
    bare = "://" not in text
    try:
        url = parse_url(f"http://{text}" if bare else text)
    except ConfigError:
        raise ConfigError(f"the URL {text!r} is not the base URL of a server; write it like {EXAMPLE_URL}") from None
    port = DEFAULT_PORT if bare and urlsplit(f"http://{text}").port is None else url.port
    name = f"[{url.host}]" if ":" in url.host else url.host
    return f"{url.scheme}://{name}:{port}{url.prefix}"


def events(lines: Iterable[bytes]) -> Iterator[Json]:
    """The JSON objects of server-sent events.

    White space may stand between ``data:`` and the object (a keep-alive). An error comes as an event, as a bare JSON
    object at the end of the stream, or as both. Raises ``ChatError`` for it, ``ValueError`` for what is no event.
    """
    data: list[bytes] = []
    bare: list[bytes] = []
    for line in lines:
        field, _, value = line.rstrip(b"\r\n").partition(b":")
        if field == b"data":
            data.append(value)
        elif field not in (b"", b"event", b"id", b"retry"):
            bare.append(line)
        elif data and not value:
            yield _event(b"\n".join(data))
            data = []
    for rest in (data, bare):
        if rest:
            yield _event(b"\n".join(rest))


def _event(text: bytes) -> Json:
    chunk = json.loads(text)
    if isinstance(chunk, list) and chunk:
        chunk = chunk[0]
    if not isinstance(chunk, dict):
        raise ValueError("an event that is no object")
    if "error" in chunk:
        error = chunk["error"]
        raise ChatError(str(error.get("message") if isinstance(error, dict) else error))
    return chunk


def chunk_of(event: Json) -> Chunk:
    """The chunk in an event. Raises ``LookupError``, ``TypeError`` or ``AttributeError`` where it is none of Gemini."""
    candidate = (event.get("candidates") or [{}])[0]
    texts = tuple(
        (str(part.get("text", "")), bool(part.get("thought"))) for part in candidate.get("content", {}).get("parts", ())
    )
    reason = candidate.get("finishReason") or event.get("promptFeedback", {}).get("blockReason") or ""
    return Chunk(texts, str(reason), dict(event.get("usageMetadata", {})))


def _is_text(head: bytes) -> bool:
    """Whether the beginning of a file is UTF-8 text; its last character may be cut."""
    try:
        return "\0" not in head.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3 and len(head) == SNIFFED_BYTES and b"\0" not in head
