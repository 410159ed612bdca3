"""Drives a running server with LiteLLM in this interpreter: `python litellm_client.py BASE_URL`."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from typing import Any, Literal

# Else it fetches the prices of all models from the network when it is imported.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from checks import ENDLESS, MODEL, QUESTION, failure, long_prompt, report
from pydantic import BaseModel, Field

litellm.suppress_debug_info = True
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


class Forecast(BaseModel):
    """What the weather will be."""

    city: Literal["Paris", "Rome"]
    degrees: int = Field(ge=0, le=40)


def ask(base_url: str, text: str, model: str = MODEL, **settings: Any) -> Any:
    return litellm.completion(
        **{
            "model": f"gemini/{model}",
            "api_base": f"{base_url}/v1beta",
            "api_key": "any",
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": 32,
            "num_retries": 0,
            "max_retries": 0,
            **settings,
        }
    )


def check_text(base_url: str) -> None:
    answer = ask(base_url, QUESTION)
    assert "Paris" in answer.choices[0].message.content, answer
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def check_a_system_message_and_history(base_url: str) -> None:
    turns = [("system", "Be brief."), ("user", "My name is Ada."), ("assistant", "Hello Ada!"), ("user", "And mine?")]
    answer = ask(base_url, "", messages=[{"role": role, "content": text} for role, text in turns])
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens > ask(base_url, "And mine?").usage.prompt_tokens


def check_stream_equals_whole(base_url: str) -> None:
    whole = ask(base_url, QUESTION)
    chunks = list(ask(base_url, QUESTION, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len(pieces) > 1
    assert "".join(pieces) == whole.choices[0].message.content
    assert litellm.stream_chunk_builder(chunks).usage.total_tokens == whole.usage.total_tokens


def check_tools(base_url: str) -> None:
    asked = [{"role": "user", "content": "What is the weather in Paris?"}]
    first = ask(base_url, "", messages=asked, tools=[WEATHER], tool_choice="required", max_tokens=64)
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls", first
    assert message.tool_calls
    for call in message.tool_calls:
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    results = [{"role": "tool", "tool_call_id": call.id, "content": "21 degrees"} for call in message.tool_calls]
    turns = [*asked, message.model_dump(), *results]
    told = ask(base_url, "", messages=turns, tools=[WEATHER], tool_choice="none")
    assert not told.choices[0].message.tool_calls
    assert told.usage.prompt_tokens > ask(base_url, asked[0]["content"], max_tokens=1).usage.prompt_tokens


def check_tools_streamed(base_url: str) -> None:
    required = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 64}
    chunks = list(ask(base_url, "What is the weather in Rome?", stream=True, **required))
    call = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


def check_structured_output(base_url: str) -> None:
    # To a model that it does not know LiteLLM sends no schema.
    answer = ask(base_url, "21 degrees in Paris.", "gemini-2.5-flash", response_format=Forecast, max_tokens=64)
    Forecast.model_validate_json(answer.choices[0].message.content)


def check_errors(base_url: str) -> None:
    for kind, arguments in (
        (litellm.NotFoundError, {"model": "no-such-model"}),
        (litellm.BadRequestError, {"temperature": 9.0}),
    ):
        for stream in (False, True):
            error = failure(kind, lambda: list(ask(base_url, "hi", stream=stream, **arguments)))  # noqa: B023
            assert "no-such-model" in str(error) or "temperature" in str(error)


def check_a_silence(base_url: str) -> None:
    chunks = list(ask(base_url, long_prompt(), ENDLESS, stream=True, max_tokens=8))
    assert len(litellm.stream_chunk_builder(chunks).choices[0].message.content) == 8


def check_an_error_in_a_stream(base_url: str) -> None:
    hurried = {"stream": True, "max_tokens": 30_000, "extra_headers": {"X-Server-Timeout": "1"}}
    kind = litellm.exceptions.MidStreamFallbackError
    error = failure(kind, lambda: list(ask(base_url, "hi", ENDLESS, **hurried)))
    assert "DEADLINE_EXCEEDED" in str(error), error


async def check_async(base_url: str) -> None:
    settings = {"api_base": f"{base_url}/v1beta", "api_key": "any", "temperature": 0, "max_tokens": 32}
    messages = [{"role": "user", "content": QUESTION}]
    answer = await litellm.acompletion(model=f"gemini/{MODEL}", messages=messages, **settings)
    assert "Paris" in answer.choices[0].message.content


if __name__ == "__main__":
    report(version("litellm"), globals().copy(), sys.argv[1])
