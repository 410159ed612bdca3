"""The calls of ``castor chat``, against servers that answer well, badly, or something else altogether."""

from __future__ import annotations

import base64
import json
import socket
from pathlib import Path

import pytest
from support.raw_server import chunked, json_answer, raw_server, whole

from server.commands.chat_client import (
    INCOMPLETE,
    INLINE_BYTES,
    SNIFFED_BYTES,
    ChatError,
    Chunk,
    Client,
    base_url,
    events,
)
from server.config.errors import ConfigError

MODELS = {"models": [{"name": "models/tiny"}, {"name": "models/large"}]}
NOT_FOUND = json_answer(
    {"error": {"code": 404, "message": "models/x is not found", "status": "NOT_FOUND"}}, "404 Not Found"
)
PAGE = whole(b"<html><title>It works!</title></html>", "text/html")


def event(text: str, **candidate: object) -> bytes:
    content = {"content": {"role": "model", "parts": [{"text": text}]}, **candidate}
    return b"data: " + json.dumps({"candidates": [content]}).encode() + b"\r\n\r\n"


ENDED = event("!", finishReason="STOP")


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("localhost", "http://localhost:8080"),
        ("localhost:9000", "http://localhost:9000"),
        ("127.0.0.1:80", "http://127.0.0.1:80"),
        ("[::1]:8080", "http://[::1]:8080"),
        ("gpu-box/castor", "http://gpu-box:8080/castor"),
        ("http://localhost", "http://localhost:80"),
        ("https://models.example/", "https://models.example:443"),
        ("http://127.0.0.1:8080/", "http://127.0.0.1:8080"),
    ],
)
def test_a_url_is_completed(text: str, url: str) -> None:
    assert base_url(text) == url


@pytest.mark.parametrize(
    "url",
    ["", "ftp://127.0.0.1", "http://127.0.0.1:port", "localhost:port", "http://[::1", "http://a b", "http://a..b"],
)
def test_what_is_not_the_url_of_a_server_is_refused_in_one_sentence(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Client(url, None).model(None)
    sentence = str(raised.value)
    assert "write it like http://127.0.0.1:8080" in sentence
    assert "\n" not in sentence


def test_no_server_is_one_sentence() -> None:
    with socket.socket() as silent:  # it has its port and does not listen, nor can anybody else there
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"^no server answers at http://127.0.0.1:{port}: Connection refused; start"
        ):
            Client(f"127.0.0.1:{port}", None).model(None)
    with pytest.raises(ConfigError, match=r"^no server answers at http://no\.such\.invalid:8080: "):
        Client("no.such.invalid", None).model(None)


@pytest.mark.parametrize(
    "answer",
    [
        PAGE,
        whole(b"<html>not here</html>", "text/html", "404 Not Found"),
        whole(b"", "text/plain", "502 Bad Gateway"),
        json_answer([1]),
        json_answer({"models": 5}),
        json_answer({"models": ["tiny"]}),
        json_answer({"detail": "Not Found"}, "404 Not Found"),
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"",
    ],
)
@pytest.mark.parametrize("name", [None, "tiny"])
def test_a_server_of_another_kind_is_one_sentence(name: str | None, answer: bytes) -> None:
    with raw_server(answer) as (url, _), pytest.raises(ConfigError, match=r"^the server at http\S+ [^\n]+$") as raised:
        Client(url, None).model(name)
    assert "does not speak the Gemini API" in str(raised.value)


def test_the_key_is_sent_and_its_refusal_is_told_in_the_server_s_words() -> None:
    refusal = {"error": {"code": 403, "message": "API key not valid.", "status": "PERMISSION_DENIED"}}
    answer = json_answer(refusal, "403 Forbidden")
    with raw_server(answer) as (url, requests), pytest.raises(ConfigError, match="refused: API key not valid"):
        Client(url, "sesame").model("tiny")
    assert b"x-goog-api-key: sesame" in requests[0].lower()


def test_a_model_is_found_or_the_others_are_named() -> None:
    with raw_server(json_answer(MODELS)) as (url, _):
        assert Client(url, None).model(None)["name"] == "models/tiny"
    with raw_server(json_answer({"name": "models/tiny"})) as (url, requests):
        assert Client(url, None).model("a b/c")["name"] == "models/tiny"
    assert requests[0].startswith(b"GET /v1beta/models/a%20b/c ")
    hint = pytest.raises(ConfigError, match=r"has no model 'tinny' \(did you mean tiny\?\); it has tiny, large$")
    with raw_server(NOT_FOUND, json_answer(MODELS)) as (url, _), hint:
        Client(url, None).model("tinny")
    with raw_server(json_answer({"models": []})) as (url, _), pytest.raises(ConfigError, match="lists no model"):
        Client(url, None).model(None)


def test_an_answer_comes_in_chunks_that_may_be_cut_anywhere() -> None:
    text = event("Par") + b"data:    " + b" " * 100 + event("is", finishReason="STOP")[6:]
    with raw_server(chunked(*(text[place : place + 7] for place in range(0, len(text), 7)))) as (url, requests):
        chunks = list(Client(url, None).stream("tiny", {"contents": []}))
    assert chunks == [Chunk((("Par", False),), "", {}), Chunk((("is", False),), "STOP", {})]
    assert requests[0].startswith(b"POST /v1beta/models/tiny:streamGenerateContent?alt=sse ")


def test_thoughts_counts_and_a_blocked_prompt() -> None:
    parts = [{"text": "Hm.", "thought": True}, {"text": "Yes"}, {"functionCall": {"name": "f"}}]
    usage = {"promptTokenCount": 3}
    one = {"candidates": [{"content": {"parts": parts}, "finishReason": "MAX_TOKENS"}], "usageMetadata": usage}
    blocked = {"promptFeedback": {"blockReason": "SAFETY"}}
    for content, chunk in (
        (one, Chunk((("Hm.", True), ("Yes", False), ("", False)), "MAX_TOKENS", usage)),
        (blocked, Chunk((), "SAFETY", {})),
    ):
        with raw_server(chunked(b"data: " + json.dumps(content).encode() + b"\n\n")) as (url, _):
            assert list(Client(url, None).stream("tiny", {})) == [chunk]


@pytest.mark.parametrize(
    "answer",
    [
        chunked(event("Par"), complete=False),
        chunked(event("Par"), complete=True),
        chunked(event("Par"), ENDED[:20], complete=False),
        chunked(event("Par"), b"data:      ", complete=False),
        chunked(event("Par"))[:-20],
        chunked(event("Par"))[:-7] + b"zz\r\n",
    ],
)
def test_a_server_that_dies_in_an_answer_is_noticed(answer: bytes) -> None:
    seen = []
    with raw_server(answer) as (url, _), pytest.raises(ChatError, match=f"^{INCOMPLETE}$"):
        seen.extend(Client(url, None).stream("tiny", {}))


ERROR = {"error": {"code": 503, "message": "The model is overloaded.", "status": "UNAVAILABLE"}}


@pytest.mark.parametrize(
    "end",
    [
        b"data: " + json.dumps(ERROR).encode() + b"\r\n\r\n" + json.dumps(ERROR).encode(),
        b"data: " + json.dumps(ERROR).encode() + b"\n\n",
        b"data:   " + json.dumps(ERROR).encode(),
        json.dumps(ERROR, indent=2).encode(),
        json.dumps([ERROR]).encode() + b"\n",
    ],
)
def test_an_error_within_an_answer_is_told_in_the_server_s_words(end: bytes) -> None:
    with raw_server(chunked(event("Par"), end)) as (url, _):
        stream = Client(url, None).stream("tiny", {})
        assert next(stream).texts == (("Par", False),)
        with pytest.raises(ChatError, match=r"^The model is overloaded\.$"):
            list(stream)


@pytest.mark.parametrize(
    "content",
    [{"candidates": "x"}, {"candidates": [1]}, {"candidates": [{"content": {"parts": 1}}]}, {"usageMetadata": 3}],
)
def test_an_event_of_another_kind_is_one_sentence(content: object) -> None:
    answer = chunked(b"data: " + json.dumps(content).encode() + b"\n\n")
    with raw_server(answer) as (url, _), pytest.raises(ConfigError, match="does not speak the Gemini API"):
        list(Client(url, None).stream("tiny", {}))


def test_comments_and_other_fields_of_events_say_nothing() -> None:
    lines = [b": ping\n", b"\n", b"event: message\n", b"id: 1\n", b"retry: 5\n", b'data: {"a":\n', b"data: 1}\n", b"\n"]
    assert list(events(lines)) == [{"a": 1}]


def test_a_small_file_goes_with_the_request(tmp_path: Path) -> None:
    notes = tmp_path / "notes.xyz"
    notes.write_text("Größe")
    with raw_server(json_answer({"totalTokens": 3})) as (url, requests):
        part = Client(url, None).file_part("tiny", notes)
    data = base64.b64encode("Größe".encode()).decode()
    assert part == {"inlineData": {"mimeType": "text/plain", "data": data}}
    assert requests[0].startswith(b"POST /v1beta/models/tiny:countTokens ")


def test_what_is_not_text_keeps_its_type(tmp_path: Path) -> None:
    contents = {
        "a.pdf": b"%PDF-1.7\n\xff\xfe",
        "a.png": b"\x89PNG\r\n\x1a\n",
        "a.unknown": b"a\0b",
        "cut.txt": b"a" * (SNIFFED_BYTES - 1) + "ö".encode() * 9,
    }
    kinds = ["application/pdf", "image/png", "application/octet-stream", "text/plain"]
    with raw_server(json_answer({"totalTokens": 3})) as (url, _):
        for (name, content), kind in zip(contents.items(), kinds, strict=True):
            (tmp_path / name).write_bytes(content)
            assert Client(url, None).file_part("tiny", tmp_path / name)["inlineData"]["mimeType"] == kind


def test_a_large_file_is_uploaded_once(tmp_path: Path) -> None:
    large = tmp_path / "large.txt"
    large.write_text("x" * (INLINE_BYTES + 1))
    place = b"http://elsewhere/upload/v1beta/files?upload_id=7"
    begun = b"HTTP/1.1 200 OK\r\nX-Goog-Upload-URL: " + place + b"\r\nContent-Length: 0\r\n\r\n"
    file = json_answer({"file": {"name": "files/a-b", "uri": "http://elsewhere/v1beta/files/a-b"}})
    with raw_server(begun, file, json_answer({"totalTokens": 3})) as (url, requests):
        client = Client(url, None)
        part = client.file_part("tiny", large)
        client.delete_file("http://elsewhere/v1beta/files/a-b")
    assert part == {"fileData": {"mimeType": "text/plain", "fileUri": "http://elsewhere/v1beta/files/a-b"}}
    start, upload, count, delete = requests
    assert b"x-goog-upload-header-content-length: 262145" in start.lower()
    assert upload.startswith(b"POST /upload/v1beta/files?upload_id=7 "), "at the server of the chat"
    assert upload.endswith(b"\r\n\r\n" + b"x" * (INLINE_BYTES + 1))
    assert b"countTokens" in count
    assert delete.startswith(b"DELETE /v1beta/files/a-b ")


def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    refusal = {"error": {"code": 400, "message": "image/png is not served", "status": "INVALID_ARGUMENT"}}
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG")
    with raw_server(json_answer(refusal, "400 Bad Request")) as (url, _):
        with pytest.raises(ConfigError, match=f"^{picture} cannot be used: image/png is not served$"):
            Client(url, None).file_part("tiny", picture)
        with pytest.raises(ConfigError, match=r"nowhere\.txt: No such file"):
            Client(url, None).file_part("tiny", tmp_path / "nowhere.txt")
        with pytest.raises(ConfigError, match="Is a directory"):
            Client(url, None).file_part("tiny", tmp_path)
