"""Drives a running server with the legacy google-generativeai SDK over REST: `python legacy_client.py BASE_URL`.

Its streams are JSON arrays, its enums are numbers.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable

warnings.simplefilter("ignore")

import google.generativeai as genai  # noqa: E402
from checks import ENDLESS, MODEL, QUESTION, long_prompt, report  # noqa: E402
from google.api_core.exceptions import BadRequest, NotFound  # noqa: E402


def weather(city: str) -> dict[str, str]:
    """The weather of a city."""
    return {"city": city, "weather": "sunny"}


def exact(tokens: int = 32, **settings: object) -> genai.GenerationConfig:
    return genai.GenerationConfig(temperature=0.0, max_output_tokens=tokens, **settings)


def model(**options: object) -> genai.GenerativeModel:
    return genai.GenerativeModel(MODEL, **options)


def check_generate() -> None:
    answer = model().generate_content(QUESTION, generation_config=exact())
    assert "Paris" in answer.text, answer.text
    assert answer.candidates[0].finish_reason.name == "STOP"
    assert answer.usage_metadata.total_token_count > answer.usage_metadata.prompt_token_count > 0


def check_json_array_streaming() -> None:
    whole = model().generate_content(QUESTION, generation_config=exact())
    stream = model().generate_content(QUESTION, generation_config=exact(), stream=True)
    texts = [chunk.text for chunk in stream if chunk.parts]
    assert len(texts) > 1
    assert "".join(texts) == whole.text
    assert stream.usage_metadata.total_token_count == whole.usage_metadata.total_token_count


def check_chat_keeps_history() -> None:
    chat = model(system_instruction="You are helpful.").start_chat()
    for message in ("My name is Ada.", "What is my name?"):
        for _ in chat.send_message(message, generation_config=exact(16), stream=True):
            pass
    assert [turn.role for turn in chat.history] == ["user", "model", "user", "model"]


def check_functions() -> None:
    calling = {"function_calling_config": {"mode": "ANY"}}
    answer = model(tools=[weather]).generate_content(
        "What is the weather in Paris?", generation_config=exact(64), tool_config=calling
    )
    call = answer.candidates[0].content.parts[0].function_call
    assert call.name == "weather", answer
    assert "city" in call.args


def check_automatic_function_calling() -> None:
    chat = model(tools=[weather]).start_chat(enable_automatic_function_calling=True)
    chat.send_message("Hello!", generation_config=exact(16))
    assert chat.history[-1].role == "model"


def check_response_schema() -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
    }
    config = exact(response_mime_type="application/json", response_schema=schema)
    answer = model().generate_content("Say Paris.", generation_config=config)
    assert json.loads(answer.text)["city"] in ("Paris", "Rome")


def check_safety_settings_and_count() -> None:
    settings = {"HARASSMENT": "BLOCK_NONE"}
    answer = model().generate_content(QUESTION, generation_config=exact(2), safety_settings=settings)
    assert model().count_tokens(QUESTION).total_tokens == answer.usage_metadata.prompt_token_count


def check_models() -> None:
    assert f"models/{MODEL}" in [found.name for found in genai.list_models(page_size=1)]


def check_errors() -> None:
    calls: tuple[tuple[type[Exception], Callable[[], object]], ...] = (
        (NotFound, lambda: genai.GenerativeModel("no-such-model").generate_content("hi")),
        (BadRequest, lambda: model().generate_content("hi", generation_config={"temperature": 9.0})),
        # The SDK cannot read what is wrong with a stream, neither here nor in the cloud: it only knows the code.
        (BadRequest, lambda: model().generate_content("hi", generation_config={"temperature": 9.0}, stream=True)),
    )
    for kind, call in calls:
        try:
            call()
        except kind:
            continue
        raise AssertionError(f"no {kind.__name__}")


def check_a_silence() -> None:
    stream = genai.GenerativeModel(ENDLESS).generate_content(long_prompt(), generation_config=exact(8), stream=True)
    assert len("".join(chunk.text for chunk in stream if chunk.parts)) == 8


if __name__ == "__main__":
    genai.configure(api_key="any", transport="rest", client_options={"api_endpoint": sys.argv[1]})
    report(genai.__version__, globals().copy())
