"""Drives a running server with llm-gemini in this interpreter: `python llm_gemini_client.py BASE_URL`.

It knows one address, Google's, and reads the stream as the JSON array that it is without ``alt=sse``. Requests to that
host are sent to the server instead, below its code; nothing of it is changed.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

import httpx
import llm
import llm_gemini
from checks import ENDLESS, MODEL, QUESTION, failure, long_prompt, report

GOOGLE = "generativelanguage.googleapis.com"


def redirect(base_url: str, headers: dict[str, str]) -> None:
    """From here on what goes to Google's host goes to ``base_url``, with these headers too."""
    target = httpx.URL(base_url)
    send = httpx.HTTPTransport.handle_request

    def to_the_server(transport: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        if request.url.host == GOOGLE:
            request.url = request.url.copy_with(scheme=target.scheme, host=target.host, port=target.port)
            request.headers.update({"host": target.netloc.decode(), **headers})
        return send(transport, request)

    httpx.HTTPTransport.handle_request = to_the_server


def ask(text: str, model: str = MODEL, **options: Any) -> Any:
    options = {"temperature": 0.0, "max_output_tokens": 32, **options}
    return llm_gemini.GeminiPro(model).prompt(text, key="any", **options)


def check_text_in_pieces() -> None:
    answer = ask(QUESTION)
    pieces = list(answer)
    assert len(pieces) > 1
    assert "Paris" in "".join(pieces)
    assert answer.input_tokens > 0
    assert answer.output_tokens > 0


def check_a_conversation() -> None:
    talk = llm_gemini.GeminiPro(MODEL).conversation()
    settings = {"key": "any", "temperature": 0.0, "max_output_tokens": 16}
    first = talk.prompt("My name is Ada.", **settings)
    first.text()
    second = talk.prompt("What is my name?", **settings)
    assert second.text()
    assert second.input_tokens > first.input_tokens


def check_a_schema() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris"]}}, "required": ["city"]}
    answer = llm_gemini.GeminiPro(MODEL, can_schema=True).prompt("Say Paris.", key="any", schema=schema)
    assert answer.text().replace(" ", "") == '{"city":"Paris"}'


def check_errors() -> None:
    missing = failure(llm.ModelError, lambda: ask("hi", "no-such-model").text())
    assert "no-such-model" in str(missing), missing
    refused = failure(llm.ModelError, lambda: ask("hi", max_output_tokens=-1).text())
    assert "max_output_tokens" in str(refused), refused


def check_a_silence() -> None:
    assert len(ask(long_prompt(), ENDLESS, max_output_tokens=8).text()) == 8


def check_an_error_in_a_stream() -> None:
    redirect(sys.argv[1], {"x-server-timeout": "1"})
    error = failure(llm.ModelError, lambda: ask("hi", ENDLESS, max_output_tokens=30_000).text())
    assert "deadline" in str(error).lower(), error


if __name__ == "__main__":
    redirect(sys.argv[1], {})
    report(version("llm-gemini"), globals().copy())
