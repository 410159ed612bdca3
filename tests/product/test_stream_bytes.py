"""The bytes of the real server's streams, in the pieces in which they come, through the parsers of the SDKs."""

from __future__ import annotations

import json
import secrets
from typing import Any

import pytest
from support.server import RunningServer
from support.stream_parsers import PARSERS, Parser, StreamFailed

pytestmark = pytest.mark.product

PATH = "/v1beta/models/endless:streamGenerateContent"
WORDS = "river stone lantern market copper window garden thunder " * 230
"""Its prefill takes about a second: a silence. Twice that takes four."""


def streamed(server: RunningServer, path: str, text: str, tokens: int, **headers: str) -> list[bytes]:
    body = {"contents": [{"parts": [{"text": text}]}], "generationConfig": {"maxOutputTokens": tokens}}
    with server.client.stream("POST", path, json=body, headers=headers) as answer:
        assert answer.status_code == 200
        return list(answer.iter_raw())


@pytest.fixture(scope="module")
def silent(restless: RunningServer) -> list[bytes]:
    """A whole answer after a silence."""
    return streamed(restless, f"{PATH}?alt=sse", f"{secrets.token_hex(8)} {WORDS}", 8)


@pytest.fixture(scope="module")
def broken(restless: RunningServer) -> list[bytes]:
    """The deadline passes in the middle of the answer."""
    headers = {"x-server-timeout": "1"}
    return streamed(restless, f"{PATH}?alt=sse", "hi", 30_000, **headers)


@pytest.fixture(scope="module")
def broken_in_silence(restless: RunningServer) -> list[bytes]:
    """The deadline passes in the prefill: the keep-alives have sent the status, and begun the event of the error."""
    headers = {"x-server-timeout": "1"}
    return streamed(restless, f"{PATH}?alt=sse", f"{secrets.token_hex(8)} {WORDS}{WORDS}", 8, **headers)


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(part["text"] for chunk in chunks for part in chunk["candidates"][0]["content"]["parts"])


def test_a_silence_is_filled_with_spaces_in_the_next_event(silent: list[bytes]) -> None:
    body = b"".join(silent).decode()
    filled, _, rest = body.partition("{")
    assert filled.strip(" ") == "data:"
    assert len(filled) > len("data:  ")
    assert not rest.startswith(" ")
    events = body.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "candidates" in json.loads(event[6:]) for event in events)


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.__name__)
def test_every_parser_reads_on_after_a_silence(parser: Parser, silent: list[bytes]) -> None:
    assert len(text_of(list(parser(silent)))) == 8


def test_an_error_is_an_event_and_the_last_bytes(broken: list[bytes], broken_in_silence: list[bytes]) -> None:
    for pieces, answered in ((broken, True), (broken_in_silence, False)):
        *events, event, bare = b"".join(pieces).decode().split("\n\n")
        assert bool(events) is answered
        assert json.loads(event.removeprefix("data:")) == json.loads(bare)
        assert json.loads(bare)["error"]["status"] == "DEADLINE_EXCEEDED"
        assert bare == bare.strip()


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.__name__)
def test_every_parser_tells_of_an_error(parser: Parser, broken: list[bytes], broken_in_silence: list[bytes]) -> None:
    for pieces in (broken, broken_in_silence):
        with pytest.raises(StreamFailed, match=r"^504 The deadline|^Failed to parse stream$|^Incomplete JSON segment"):
            list(parser(pieces))


def test_an_array_stays_json_after_a_silence_and_an_error(restless: RunningServer) -> None:
    silent = b"".join(streamed(restless, PATH, f"{secrets.token_hex(8)} {WORDS}", 8))
    assert len(text_of(json.loads(silent))) == 8
    headers = {"x-server-timeout": "1"}
    *chunks, last = json.loads(b"".join(streamed(restless, PATH, "hi", 30_000, **headers)))
    assert chunks
    assert last["error"]["code"] == 504
