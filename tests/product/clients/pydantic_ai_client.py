"""Drives a running server with pydantic-ai in this interpreter: `python pydantic_ai_client.py BASE_URL`."""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

from checks import ENDLESS, MODEL, QUESTION, failure, long_prompt, report
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.google import GoogleModel, GoogleModelSettings
from pydantic_ai.providers.google import GoogleProvider
from pydantic_ai.usage import UsageLimits

THINKING_MODEL = "gemini-3-pro-preview"
"""Another name of the built-in model; for Gemini 3 pydantic-ai sends a schema and functions in one request."""


class Forecast(BaseModel):
    """What the weather will be."""

    city: Literal["Paris", "Rome"]
    degrees: int = Field(ge=0, le=40)


def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"21 degrees in {city}"


def agent(base_url: str, model: str = MODEL, *, tokens: int = 32, seconds: str = "", **options: Any) -> Any:
    settings = GoogleModelSettings(temperature=0.0, max_tokens=tokens)
    if seconds:
        settings["extra_headers"] = {"X-Server-Timeout": seconds}
    provider = GoogleProvider(api_key="any", base_url=base_url)
    return Agent(GoogleModel(model, provider=provider), model_settings=settings, **options)


async def check_text(base_url: str) -> None:
    result = await agent(base_url, system_prompt="You are helpful.").run(QUESTION)
    assert "Paris" in result.output, result
    usage = result.usage
    assert usage.input_tokens > 0
    assert usage.output_tokens > 0


async def check_stream_equals_whole(base_url: str) -> None:
    whole = await agent(base_url).run(QUESTION)
    async with agent(base_url).run_stream(QUESTION) as result:
        pieces = [piece async for piece in result.stream_text(delta=True, debounce_by=None)]
    assert len(pieces) > 1
    assert "".join(pieces) == whole.output


async def check_history(base_url: str) -> None:
    first = await agent(base_url).run("My name is Ada.")
    second = await agent(base_url).run("What is my name?", message_history=first.all_messages())
    assert second.usage.input_tokens > first.usage.input_tokens


async def check_output_by_a_tool(base_url: str) -> None:
    result = await agent(base_url, tokens=64, output_type=ToolOutput(Forecast)).run("21 degrees in Paris.")
    assert isinstance(result.output, Forecast)


async def check_native_output(base_url: str) -> None:
    result = await agent(base_url, tokens=64, output_type=NativeOutput(Forecast)).run("21 degrees in Paris.")
    assert isinstance(result.output, Forecast)


async def check_a_tool_and_native_output(base_url: str) -> None:
    """Functions and a schema in one request: the model may call, and what it says follows the schema."""
    both = agent(base_url, THINKING_MODEL, tokens=64, output_type=NativeOutput(Forecast), tools=[weather])
    result = await both.run("21 degrees in Paris.", usage_limits=UsageLimits(request_limit=5))
    assert isinstance(result.output, Forecast)


async def check_a_tool(base_url: str) -> None:
    """A tool in mode AUTO: small models answer in words or call, and both end in a text."""
    result = await agent(base_url, tools=[weather]).run("Hello!", usage_limits=UsageLimits(request_limit=5))
    assert result.output


async def check_count_before(base_url: str) -> None:
    limits = UsageLimits(input_tokens_limit=5000, count_tokens_before_request=True)
    result = await agent(base_url).run(QUESTION, usage_limits=limits)
    assert "Paris" in result.output


def check_errors(base_url: str) -> None:
    for status, wrong in ((404, agent(base_url, "no-such-model")), (400, agent(base_url, tokens=-1))):
        assert failure(ModelHTTPError, partial(wrong.run_sync, "hi")).status_code == status


async def check_a_silence(base_url: str) -> None:
    async with agent(base_url, ENDLESS, tokens=8).run_stream(long_prompt()) as result:
        assert len(await result.get_output()) == 8


def check_an_error_in_a_stream(base_url: str) -> None:
    async def read() -> None:
        async with agent(base_url, ENDLESS, tokens=30_000, seconds="1").run_stream("hi") as result:
            await result.get_output()

    assert failure(ModelHTTPError, lambda: asyncio.run(read())).status_code == 504


if __name__ == "__main__":
    report(version("pydantic-ai-slim"), globals().copy(), sys.argv[1])
