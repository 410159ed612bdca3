"""A tool loop through the template of every family: what the model writes comes out as calls, and goes back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.fakes import INFO, Answering, Harness, serving
from support.templates import FOLDER, template_folder

from engine.api.events import CandidateFinished, Delta, Event, FinishReason, RequestFinished
from engine.api.requests import Request

TRANSCRIPTS = Path(__file__).parents[2] / "data" / "transcripts"
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
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


def call_as_written(family: str, opened: bool) -> tuple[str, list[dict[str, Any]]]:
    """What a model of the family wrote, from its golden transcripts, and the calls that are in it."""
    transcripts = [yaml.safe_load(path.read_text()) for path in TRANSCRIPTS.glob("*.yaml")]
    (cases,) = [transcript["cases"] for transcript in transcripts if transcript["family"] == family]
    for case in cases:
        calls = [{"name": part["call"], "args": part["args"]} for part in case["parts"] if "call" in part]
        whole = "finish" not in case and "end" not in case and bool(case.get("opened")) <= opened
        if whole and calls and {call["name"] for call in calls} <= {"get_weather", "get_time"}:
            closing = "Hm.\n</think>\n\n" if opened and not case.get("opened") else ""
            return closing + case["text"], calls
    raise AssertionError(f"{family} has no transcript of a call")


def saying(text: str) -> Answering:
    """One candidate that writes this text, a token for each character."""

    def script(request: Request) -> list[Event]:
        deltas: list[Event] = [Delta(0, (66,), char) for char in text]
        finished = CandidateFinished(0, FinishReason.STOP, len(text))
        return [*deltas, finished, RequestFinished(len(request.prompt), 0, len(text))]

    return script


def prompt_text(harness: Harness) -> str:
    tokenizer = harness.services.registry.entries()[0].tokenizer
    return "".join(map(tokenizer.token_text, harness.engine.requests[-1].prompt))


@pytest.mark.parametrize("name", TEMPLATES)
async def test_a_tool_loop_in_the_words_of_the_family(name: str, tmp_path: Path) -> None:
    async with serving(template_folder(tmp_path / "model", name)) as harness:
        harness.engine.info = replace(INFO, max_context=100_000)
        family = harness.services.registry.entries()[0].tokenizer.family
        await harness.generate({"contents": [ASKED], "tools": TOOLS})
        thinking = harness.engine.requests[-1].sampling.thinking
        opened = thinking is not None and thinking.open
        assert "get_weather" in prompt_text(harness)

        # Where a template renders no tools, Castor asks for calls in its own words.
        text, calls = call_as_written(family.name if family.renders_tools else "castor", opened)
        harness.engine.answers.append(saying(text))
        answer = (await harness.generate({"contents": [ASKED], "tools": TOOLS})).json()["candidates"][0]
        told = [part["functionCall"] for part in answer["content"]["parts"] if "functionCall" in part]
        assert [{"name": call["name"], "args": call["args"]} for call in told] == calls
        assert answer["finishReason"] == "STOP"

        results = [{"functionResponse": {"name": call["name"], "response": {"result": "sunny 4711"}}} for call in told]
        contents = [ASKED, answer["content"], {"role": "user", "parts": results}]
        after = await harness.generate({"contents": contents, "tools": TOOLS})
        assert after.status_code == 200, after.text
        assert prompt_text(harness).count("sunny 4711") == len(calls)


async def test_an_answer_to_a_schema_opens_its_channel_first(tmp_path: Path) -> None:
    config = {"responseMimeType": "application/json", "responseSchema": {"type": "BOOLEAN"}}
    headers = {"gpt-oss": "<|channel|>final<|message|>", "Muse": " to=user<|message|>", "Qwen3-0.6B": ""}
    for name, header in headers.items():
        async with serving(template_folder(tmp_path / name, name)) as harness:
            harness.engine.info = replace(INFO, max_context=100_000)
            harness.engine.answers.append(saying(f"{header}true"))
            answer = await harness.generate({"contents": [ASKED], "generationConfig": config})
            assert answer.json()["candidates"][0]["content"]["parts"] == [{"text": "true"}]
            grammar = harness.engine.requests[-1].sampling.grammar
            assert grammar is not None
            assert ("@answer" in grammar) is bool(header)
