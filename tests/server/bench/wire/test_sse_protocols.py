"""Streams of both kinds, cut anywhere."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.sse_server import gemini_event, openai_event

from server.bench.wire.protocols import Call, Dialect, Gemini, OpenAi, Progress, SseReader

STREAM = b": note\n\n" + gemini_event("Hé", 1) + b"\n" + gemini_event("", 2, "STOP") + b"data: [DONE]\n\n"
CALL = Call("Tell me.", 9)


def read(pieces: list[bytes]) -> list[bytes]:
    reader = SseReader()
    return [event for piece in pieces for event in reader.feed(piece)]


def test_events_of_a_whole_stream() -> None:
    first, last, done = read([STREAM])
    assert json.loads(first)["candidates"][0]["content"]["parts"] == [{"text": "Hé"}]
    assert json.loads(last)["candidates"][0]["finishReason"] == "STOP"
    assert done == b"[DONE]"


@given(st.lists(st.integers(0, len(STREAM)), max_size=12).map(sorted))
def test_a_stream_may_be_cut_at_any_byte(cuts: list[int]) -> None:
    places = [0, *cuts, len(STREAM)]
    pieces = [STREAM[begin:end] for begin, end in pairwise(places)]
    assert read(pieces) == read([STREAM])


def test_lines_may_end_with_carriage_returns() -> None:
    assert read([b"data: a\r\n\r\ndata:b\r\n"]) == [b"a", b"b"]


def test_gemini_progress() -> None:
    gemini = Gemini()
    assert gemini.read(read([gemini_event("a", 3)])[0]) == Progress(True, 3, 7)
    assert gemini.read(read([gemini_event("", 4, "MAX_TOKENS")])[0]) == Progress(False, 4, 7, None, "MAX_TOKENS")
    assert gemini.read(b'{"error": {"code": 503, "message": "gone"}}').error == "gone"
    thinking = b'{"usageMetadata": {"candidatesTokenCount": 2, "thoughtsTokenCount": 5, "cachedContentTokenCount": 6}}'
    assert gemini.read(thinking) == Progress(False, 7, None, 6)


def test_openai_progress() -> None:
    openai = OpenAi()
    assert openai.read(read([openai_event("a")])[0]) == Progress(True)
    assert openai.read(b'{"choices": [{"delta": {"role": "assistant", "content": null}}]}') == Progress()
    assert openai.read(read([openai_event(finish="length")])[0]) == Progress(finish_reason="length")
    assert openai.read(read([openai_event(total=6)])[0]) == Progress(output_tokens=6, prompt_tokens=5)
    assert openai.read(b"[DONE]") == Progress()
    assert openai.read(b'{"error": {"message": "no"}}').error == "no"
    assert openai.read(b'{"error": "no"}').error == "no"


@pytest.mark.parametrize(
    "event",
    [
        *(b"[1]", b'"text"', b"null", b'{"candidates": {"a": 1}}', b'{"candidates": [[]]}'),
        *(b'{"choices": "x"}', b'{"choices": [1]}', b'{"usage": [1]}', b'{"usageMetadata": 3}'),
        *(b'{"usage": {"completion_tokens": "3"}}', b'{"usageMetadata": {"promptTokenCount": "3"}}'),
    ],
)
def test_events_of_any_other_shape_are_told_as_such(event: bytes) -> None:
    dialects: list[Dialect] = [Gemini(), OpenAi()]
    told = []
    for dialect in dialects:
        try:
            assert dialect.read(event) == Progress(), "it looks at other fields"
        except ValueError as error:
            told.append(str(error))
    assert told
    assert all("an event that this API does not have: " + event.decode() in words for words in told)


def test_what_is_asked() -> None:
    path, body = Gemini().request("org/name", CALL)
    assert path == "/v1beta/models/org/name:streamGenerateContent?alt=sse"
    assert json.loads(body)["generationConfig"] == {"temperature": 0, "maxOutputTokens": 9}
    path, body = OpenAi().request("name", CALL)
    assert path == "/v1/chat/completions"
    asked = json.loads(body)
    assert (asked["temperature"], asked["max_tokens"], asked["stream"]) == (0, 9, True)
    assert asked["stream_options"] == {"include_usage": True}


def test_schemas_go_where_each_kind_looks_for_them() -> None:
    call = Call("Tell me.", 9, {"type": "object"})
    config = json.loads(Gemini().request("m", call)[1])["generationConfig"]
    assert (config["responseMimeType"], config["responseJsonSchema"]) == ("application/json", {"type": "object"})
    asked = json.loads(OpenAi().request("m", call)[1])["response_format"]
    assert asked["json_schema"]["schema"] == {"type": "object"}


def test_keys() -> None:
    assert Gemini().headers(None) == OpenAi().headers(None) == {}
    assert Gemini().headers("k") == {"x-goog-api-key": "k"}
    assert OpenAi().headers("k") == {"authorization": "Bearer k"}
