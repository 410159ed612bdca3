"""Golden transcripts of what each family's models write, and fragments to make other answers of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.families.table import FAMILIES
from server.families.tagged_calls import CASTOR

FOLDER = Path(__file__).parents[1] / "data" / "transcripts"
FAMILY = {family.name: family for family in FAMILIES} | {"castor": replace(CASTOR, thought=None)}


def declared(name: str, **properties: str) -> dict[str, Any]:
    """A function as chat templates get it."""
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [
    declared("get_weather", city="string", days="integer"),
    declared("get_time"),
    declared("write", text="string", options="object"),
]
"""The functions that all transcripts call, unless they say otherwise."""

FRAGMENTS = [
    *sorted(
        {text for family in FAMILIES for text in (*family.markers, family.call.trigger, family.call.call_start) if text}
    ),
    *("<", "|", "{", "}", "[", "]", '"', "\\", ";", " ", "\n", "a", "é", "get_time", "<function=", ">", "</function>"),
    *('{"name": "get_time", "arguments": {}}', '{"name": "get_time", "parameters": {}}', "{}", "[]"),
    *("to=functions.get_time", "json", "analysis", "final", "commentary", "\n```json\n", "\n```", "function", "\0"),
]


def cases() -> Iterator[Any]:
    """Each family with each of its transcripts."""
    for path in sorted(FOLDER.glob("*.yaml")):
        document = yaml.safe_load(path.read_text("utf-8"))
        for case in document["cases"]:
            yield pytest.param(FAMILY[document["family"]], case, id=f"{path.stem}: {case['name']}")


def cut(text: str, size: int) -> list[str]:
    """The text in pieces of this many characters."""
    return [text[start : start + size] for start in range(0, len(text), size)]
