"""The sampling that a model's own generation_config.json asks for, and what is done with one that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from server.config.models_file import ModelSpec
from server.models.own_defaults import FILE, MAX_BYTES, own_defaults, with_own_defaults


def defaults_of(folder: Path, text: str) -> tuple[dict[str, Any], list[str]]:
    """The defaults of a file, and the fields or reasons that were logged."""
    (folder / FILE).write_text(text)
    with capture_logs() as logged:
        found = own_defaults(folder)
    return found, [line.get("field", line["reason"]) for line in logged]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, {}),
        (
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True},
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
        ),
        ({"min_p": 0.1, "repetition_penalty": 1.05}, {"min_p": 0.1, "repetition_penalty": 1.05}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.8}, {"temperature": 0.0, "top_p": 0.8}),
        ({"temperature": None, "presence_penalty": 1.0, "eos_token_id": [2], "max_length": 20}, {}),
    ],
)
def test_what_the_file_sets(content: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    assert defaults_of(tmp_path, json.dumps(content)) == (expected, [])


def test_the_entry_wins_field_by_field(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"temperature": 0.6, "top_k": 20, "do_sample": false}')
    spec = with_own_defaults(ModelSpec("m", "/m", temperature=0.9), tmp_path)
    assert (spec.temperature, spec.top_p, spec.top_k) == (0.9, None, 20)
    assert with_own_defaults(ModelSpec("m", "/m"), tmp_path).temperature == 0
    assert with_own_defaults(ModelSpec("m", "/m"), tmp_path / "nowhere") == ModelSpec("m", "/m")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "2.5"),
        ("temperature", "-1"),
        ("temperature", "NaN"),
        ("temperature", "true"),
        ("temperature", '"hot"'),
        ("temperature", "[0.5]"),
        ("temperature", "1" + "0" * 400),
        ("top_p", "1.5"),
        ("top_p", "Infinity"),
        ("top_k", "-1"),
        ("top_k", "2.5"),
        ("min_p", "-0.1"),
        ("repetition_penalty", "0"),
    ],
)
def test_a_value_out_of_range_is_left_out_and_logged(name: str, value: str, tmp_path: Path) -> None:
    found, logged = defaults_of(tmp_path, f'{{"{name}": {value}, "top_{"k" if name != "top_k" else "p"}": 1}}')
    assert found == {"top_p" if name == "top_k" else "top_k": 1}
    assert logged == [name]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', "[" * 100_000, f'{{"a": "{"x" * MAX_BYTES}"}}', "1" * 5000]
)
def test_a_file_that_is_no_object_is_left_out_and_logged(text: str, tmp_path: Path) -> None:
    found, logged = defaults_of(tmp_path, text)
    assert found == {}
    assert len(logged) == 1


def test_a_file_that_cannot_be_read_is_logged(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with capture_logs() as logged:
        assert own_defaults(tmp_path) == {}
    assert "directory" in logged[0]["reason"]
    assert own_defaults(tmp_path / "nowhere") == {}
