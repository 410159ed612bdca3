"""Structured output from the real model: what is asked for in each way is what comes, whole and streamed."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from support.sdks import CLIENTS, PYTHON_SDKS, sdk_python
from support.server import RunningServer

pytestmark = pytest.mark.product

NAME = {"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"}
PERSON = {
    "type": "object",
    "properties": {"name": NAME, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {"value": {"enum": [1, 2]}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/Node"}]}},
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/Node",
}
LATIN = {"type": "array", "items": NAME, "minItems": 2, "maxItems": 3}
TAGGED = {
    "oneOf": [
        {"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"enum": [7, 9]}}, "required": ["kind"]},
        {"type": "object", "properties": {"kind": {"const": "dog"}}, "required": ["kind"]},
    ]
}
DATED = {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}, "required": ["day"]}
JSON_SCHEMAS = {
    "person": PERSON,
    "list": LATIN,
    "tagged": TAGGED,
    "dated": DATED,
    "number": {"type": "integer", "minimum": 1, "maximum": 99},
}


def asking(text: str, **config: Any) -> dict[str, Any]:
    settings = {"temperature": 0, "seed": 1, "maxOutputTokens": 200, **config}
    return {"contents": [{"role": "user", "parts": [{"text": text}]}], "generationConfig": settings}


def answered(castor: RunningServer, body: dict[str, Any]) -> tuple[str, str]:
    response = castor.generate(body)
    assert response.status_code == 200, response.text
    candidate = response.json()["candidates"][0]
    return candidate["content"]["parts"][0]["text"], candidate["finishReason"]


@pytest.mark.parametrize("name", JSON_SCHEMAS)
def test_json_schema(castor: RunningServer, name: str) -> None:
    schema = JSON_SCHEMAS[name]
    body = asking("Answer in JSON.", responseMimeType="application/json", responseJsonSchema=schema)
    text, reason = answered(castor, body)
    assert reason == "STOP", text
    Draft202012Validator(schema).validate(json.loads(text))


def test_recursion_ends_or_is_cut_off_by_length(castor: RunningServer) -> None:
    body = asking("A short list.", responseMimeType="application/json", responseJsonSchema=TREE, temperature=1)
    text, reason = answered(castor, body)
    if reason == "STOP":
        Draft202012Validator(TREE).validate(json.loads(text))
    else:
        assert reason == "MAX_TOKENS"
        assert text.startswith('{"value": ')


def test_a_schema_message_and_its_order(castor: RunningServer) -> None:
    schema = {
        "type": "OBJECT",
        "properties": {
            "age": {"type": "INTEGER", "nullable": True, "maximum": 120},
            "name": {"type": "STRING", "max_length": "8"},
        },
        "required": ["name", "age"],
        "property_ordering": ["name", "age"],
    }
    body = asking("Describe a person.", responseMimeType="application/json", responseSchema=schema, temperature=1)
    body["generationConfig"]["candidateCount"] = 3
    response = castor.generate(body)
    assert response.status_code == 200, response.text
    for candidate in response.json()["candidates"]:
        person = json.loads(candidate["content"]["parts"][0]["text"])
        assert list(person) == ["name", "age"]
        assert len(person["name"]) <= 8
        assert person["age"] is None or person["age"] <= 120


def test_a_choice_is_a_bare_text(castor: RunningServer) -> None:
    schema: dict[str, Any] = {"type": "STRING", "enum": ["Paris", "Berlin", "Rome"]}
    body = asking("The capital of France?", responseMimeType="text/x.enum", responseSchema=schema)
    text, reason = answered(castor, body)
    assert text in schema["enum"]
    assert reason == "STOP"


def test_streamed_and_whole_are_the_same(castor: RunningServer) -> None:
    body = asking("Describe a person.", responseMimeType="application/json", responseJsonSchema=PERSON)
    path = "/v1beta/models/smollm2-135m-instruct:streamGenerateContent"
    chunks = castor.client.post(path, json=body).json()
    pieces = [part["text"] for chunk in chunks for part in chunk["candidates"][0]["content"]["parts"]]
    assert "".join(pieces) == answered(castor, body)[0]


def test_what_cannot_be_enforced_is_named_and_checked(castor: RunningServer) -> None:
    tags = {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 3, "maxItems": 3, "uniqueItems": True}
    schema = {"type": "object", "properties": {"tags": tags}, "required": ["tags"]}
    body = asking("Colours.", responseMimeType="application/json", responseJsonSchema=schema)
    response = castor.generate(body)
    assert response.headers["x-castor-ignored"] == "generationConfig.responseJsonSchema.properties.tags.uniqueItems"
    said = 'The answer does not satisfy "uniqueItems" at tags.'
    assert response.json()["candidates"][0]["finishMessage"] == said
    path = "/v1beta/models/smollm2-135m-instruct:streamGenerateContent"
    chunks = castor.client.post(path, json=body).json()
    messages = [chunk["candidates"][0].get("finishMessage") for chunk in chunks]
    assert messages == [None] * (len(chunks) - 1) + [said]


def test_a_model_may_call_or_answer_by_the_schema(castor: RunningServer) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}, "required": ["city"]}
    tools = [{"functionDeclarations": [{"name": "get_weather", "parameters": parameters}]}]
    schema = {"type": "object", "properties": {"temp": {"type": "integer", "maximum": 99}}, "required": ["temp"]}
    config = {"responseMimeType": "application/json", "responseJsonSchema": schema, "candidateCount": 8}
    answer = castor.generate({**asking("Weather in Oslo?", **config), "tools": tools}).json()
    for candidate in answer["candidates"]:
        for part in candidate["content"]["parts"]:
            called = "functionCall" in part
            value = part["functionCall"]["args"] if called else json.loads(part["text"])
            Draft202012Validator(parameters if called else schema).validate(value)


@pytest.mark.parametrize("version", PYTHON_SDKS)
def test_the_sdk_gives_parsed_objects(version: str, castor: RunningServer) -> None:
    command = [sdk_python(version), CLIENTS / "genai_structured.py", castor.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["version"] == version
