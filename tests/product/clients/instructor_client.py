"""Drives a running server with instructor in this interpreter: `python instructor_client.py BASE_URL`."""

from __future__ import annotations

import sys
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

import instructor
from checks import ENDLESS, MODEL, failure, long_prompt, report
from google import genai
from google.genai import types
from instructor.core import InstructorRetryException
from pydantic import BaseModel, Field

SAID = "21 degrees in Paris."


class Forecast(BaseModel):
    """What the weather will be."""

    city: Literal["Paris", "Rome"]
    degrees: int = Field(ge=0, le=40)


class Name(BaseModel):
    """A short name."""

    name: str = Field(max_length=8)


def ask(base_url: str, mode: instructor.Mode, model: str = MODEL, text: str = SAID, **more: Any) -> Any:
    options = types.HttpOptions(base_url=base_url)
    client = instructor.from_genai(genai.Client(api_key="any", http_options=options), mode=mode)
    settings = {"response_model": Forecast, "max_retries": 1, "temperature": 0.0, "max_tokens": 64, **more}
    return client.create(model=model, messages=[{"role": "user", "content": text}], **settings)


def check_one_call_of_the_only_function(base_url: str) -> None:
    assert isinstance(ask(base_url, instructor.Mode.TOOLS), Forecast)


def check_json(base_url: str) -> None:
    assert isinstance(ask(base_url, instructor.Mode.JSON), Forecast)


def check_partial_answers(base_url: str) -> None:
    options = types.HttpOptions(base_url=base_url)
    client = instructor.from_genai(genai.Client(api_key="any", http_options=options), mode=instructor.Mode.JSON)
    messages = [{"role": "user", "content": SAID}]
    settings = {"response_model": Forecast, "temperature": 0.0, "max_tokens": 64}
    seen = list(client.create_partial(model=MODEL, messages=messages, **settings))
    assert len(seen) > 1
    Forecast.model_validate(seen[-1].model_dump())


def check_a_long_prompt(base_url: str) -> None:
    """A silence before an answer that is no stream: nothing is sent in it."""
    assert isinstance(ask(base_url, instructor.Mode.JSON, ENDLESS, long_prompt(), response_model=Name), Name)


def check_errors(base_url: str) -> None:
    for code, wrong in ((404, {"model": "no-such-model"}), (400, {"temperature": 9.0})):
        error = failure(InstructorRetryException, partial(ask, base_url, instructor.Mode.TOOLS, **wrong))
        assert f"{code} " in str(error), error


if __name__ == "__main__":
    report(version("instructor"), globals().copy(), sys.argv[1])
