"""A tool loop through the template of every real family: what the model writes comes out as calls, and goes back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.fakes import INFO, Answering, Harness, serving
from support.templates import template_folder

from engine.types import CandidateFinished, Delta, Event, FinishReason, Request, RequestFinished

TRANSCRIPTS = Path(__file__).parents[2] / "data" / "transcripts"
TEMPLATES = ("Qwen3-0.6B", "Qwen3-Coder", "SmolLM3", "Mistral-Small", "gpt-oss", "DeepSeek-R1", "granite")
TOOLS = [
    {
        "functionDeclarations": [
            {
                "name": "get_weather",
                "description": "The weather of a city",
                "parameters": {
                    "type": "OBJECT",
                    "properties": {"city": {"type": "STRING"}, "days": {"type": "INTEGER"}},
                    "required": ["city"],
                },
            },
            {"name": "get_time", "description": "The time"},
        ]
    }
]
ASKED = {"role": "user", "parts": [{"text": "How is the weather?"}]}


def call_as_written(family: str) -> tuple[str, list[dict[str, Any]]]:
    """What a model of the family wrote, from its golden transcripts, and the calls that are in it."""
    for path in TRANSCRIPTS.glob("*.yaml"):
        transcript = yaml.safe_load(path.read_text())
        if transcript["family"] == family.split("+")[0]:
            for case in transcript["cases"]:
                calls = [part for part in case["parts"] if "call" in part]
                plain = not case.get("opened") and "finish" not in case and "end" not in case
                if calls and plain:
                    return case["text"], [{"name": call["call"], "args": call["args"]} for call in calls]
    raise AssertionError(f"{family} has no transcript of a call")


def saying(text: str) -> Answering:
    """One candidate that writes this text, a token for each character."""

    def script(request: Request) -> list[Event]:
        deltas: list[Event] = [Delta(0, (66,), char) for char in text]
        finished = CandidateFinished(0, FinishReason.STOP, len(text))
        return [*deltas, finished, RequestFinished(len(request.prompt), 0, len(text))]

    return script


def prompt_text(harness: Harness) -> str:
    tokenizer = harness.app.state.registry.entries()[0].tokenizer
    return "".join(map(tokenizer.token_text, harness.engine.requests[-1].prompt))


@pytest.mark.parametrize("name", TEMPLATES)
async def test_a_tool_loop_in_the_words_of_the_family(name: str, tmp_path: Path) -> None:
    async with serving(template_folder(tmp_path / "model", name)) as harness:
        harness.engine.info = replace(INFO, max_context=100_000)
        family = harness.app.state.registry.entries()[0].tokenizer.family
        text, calls = call_as_written(family.name)
        await harness.generate({"contents": [ASKED], "tools": TOOLS})
        thinking = harness.engine.requests[-1].sampling.thinking
        opened = thinking is not None and thinking.open
        assert "get_weather" in prompt_text(harness)

        harness.engine.answers.append(saying(f"Hm.\n{family.thought[1]}\n\n{text}" if opened else text))
        answer = (await harness.generate({"contents": [ASKED], "tools": TOOLS})).json()["candidates"][0]
        told = [part["functionCall"] for part in answer["content"]["parts"] if "functionCall" in part]
        assert [{"name": call["name"], "args": call["args"]} for call in told] == calls
        assert answer["finishReason"] == "STOP"

        results = [{"functionResponse": {"name": call["name"], "response": {"result": "sunny 4711"}}} for call in told]
        contents = [ASKED, answer["content"], {"role": "user", "parts": results}]
        after = await harness.generate({"contents": contents, "tools": TOOLS})
        assert after.status_code == 200, after.text
        assert prompt_text(harness).count("sunny 4711") == len(calls)
