"""Drives a running server with langchain-google-genai in this interpreter: `python langchain_client.py BASE_URL`."""

from __future__ import annotations

import sys
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

from checks import ENDLESS, MODEL, QUESTION, failure, long_prompt, report
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_google_genai import ChatGoogleGenerativeAI
from langchain_google_genai.chat_models import ChatGoogleGenerativeAIError, GoogleAPIError
from pydantic import BaseModel, Field


@tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"21 degrees in {city}"


class Forecast(BaseModel):
    """What the weather will be."""

    city: Literal["Paris", "Rome"]
    degrees: int = Field(ge=0, le=40)


def chat(base_url: str, tokens: int = 32, model: str = MODEL, **more: Any) -> ChatGoogleGenerativeAI:
    settings = {"temperature": 0, "max_output_tokens": tokens, "max_retries": 1, **more}
    return ChatGoogleGenerativeAI(model=model, google_api_key="any", base_url=base_url, **settings)


def check_invoke(base_url: str) -> None:
    answer = chat(base_url).invoke(QUESTION)
    assert "Paris" in answer.text, answer
    usage = answer.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"], usage
    assert answer.response_metadata["finish_reason"] == "STOP"


def check_stream_equals_whole(base_url: str) -> None:
    whole = chat(base_url).invoke(QUESTION)
    chunks = list(chat(base_url).stream(QUESTION))
    merged = chunks[0]
    for chunk in chunks[1:]:
        merged += chunk
    assert len(chunks) > 1
    assert merged.text == whole.text
    assert merged.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]


def check_tools(base_url: str) -> None:
    question = HumanMessage("What is the weather in Paris?")
    answer = chat(base_url, 40).bind_tools([weather], tool_choice="any").invoke([question])
    assert answer.tool_calls, answer
    call = answer.tool_calls[0]
    assert call["name"] == "weather"
    assert call["args"]["city"] in ("Paris", "Rome")
    assert call["id"]
    results: list[ToolMessage] = [weather.invoke(call) for call in answer.tool_calls]
    told = chat(base_url, 24).bind_tools([weather], tool_choice="none").invoke([question, answer, *results])
    assert isinstance(told, AIMessage)
    assert not told.tool_calls
    # Mode NONE is as if nothing were declared: what the second prompt has more than the bare question is the result.
    bare = chat(base_url, 1).invoke([question])
    assert told.usage_metadata["input_tokens"] > bare.usage_metadata["input_tokens"]


def check_tools_streamed(base_url: str) -> None:
    chunks = list(
        chat(base_url, 40).bind_tools([weather], tool_choice="weather").stream("What is the weather in Rome?")
    )
    merged = chunks[0]
    for chunk in chunks[1:]:
        merged += chunk
    assert merged.tool_calls[0]["name"] == "weather", merged
    assert merged.tool_calls[0]["args"]["city"] in ("Paris", "Rome")


def check_structured_output(base_url: str) -> None:
    for method in ("json_schema", "function_calling"):
        asked = chat(base_url, 64).with_structured_output(Forecast, method=method)
        assert isinstance(asked.invoke("Say: 21 degrees in Paris."), Forecast), method


def check_count(base_url: str) -> None:
    answer = chat(base_url, 1).invoke(QUESTION)
    assert chat(base_url).get_num_tokens(QUESTION) == answer.usage_metadata["input_tokens"]


def check_errors(base_url: str) -> None:
    for code, wrong in (("404", {"model": "no-such-model"}), ("400", {"stop": [""]})):
        error = failure(ChatGoogleGenerativeAIError, partial(chat(base_url, **wrong).invoke, "hi"))
        assert code in str(error), error


def check_a_silence(base_url: str) -> None:
    chunks = chat(base_url, 8, ENDLESS).stream(long_prompt())
    assert len("".join(chunk.text for chunk in chunks)) == 8


def check_an_error_in_a_stream(base_url: str) -> None:
    hurried = chat(base_url, 30_000, ENDLESS, additional_headers={"X-Server-Timeout": "1"})
    assert failure(GoogleAPIError, lambda: list(hurried.stream("hi"))).code == 504


if __name__ == "__main__":
    report(version("langchain-google-genai"), globals().copy(), sys.argv[1])
