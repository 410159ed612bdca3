"""The fields of answers are those of the discovery document, and those that this server sends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.golden_files import files, load

from server.routes import ROUTES
from server.wire import answers
from server.wire.answers import ANYTHING, Fields

DISCOVERY = json.loads((Path(__file__).parents[2] / "data" / "discovery_fields.json").read_text("utf-8"))
NEWER = {
    *("GenerateContentResponse.createTime", "PromptFeedback.blockReasonMessage", "CitationMetadata.citations"),
    *("Candidate.continuationToken", "UsageMetadata.trafficType", "FunctionCall.partialArgs"),
    *("FunctionCall.willContinue", "Blob.displayName", "FileData.displayName"),
}
"""Fields that SDKs know and the document does not."""
TABLES = {
    "GenerateContentResponse": answers.GENERATE_CONTENT,
    "CountTokensResponse": answers.COUNT_TOKENS,
    "ListModelsResponse": answers.LIST_MODELS,
    "Model": answers.MODEL,
    "ListFilesResponse": answers.LIST_FILES,
    "File": answers.FILE,
    "CreateFileResponse": answers.CREATE_FILE,
}


def differences(message: str, fields: Fields) -> Iterator[str]:
    """Where a table and a schema of the document do not have the same fields."""
    known = DISCOVERY["schemas"].get(message)
    if known is None:
        return
    yield from (f"{message}.{name}" for name in set(fields) ^ set(known))
    for name, inner in fields.items():
        if inner is not ANYTHING and known.get(name):
            yield from differences(known[name], inner)


def test_every_answer_of_the_document_has_a_table() -> None:
    assert {message for message in DISCOVERY["answers"].values() if message} == set(TABLES)


@pytest.mark.parametrize("message", TABLES)
def test_a_table_has_the_fields_of_its_message(message: str) -> None:
    assert set(differences(message, TABLES[message])) <= NEWER


def golden_answers() -> Iterator[Any]:
    """The JSON of every answer in the golden transcripts that is a success."""
    for path in files():
        for case in load(path)["cases"]:
            for step in case["steps"]:
                answer = step.get("answer") or {}
                if answer.get("status") == 200 and "json" in answer:
                    yield from answer["json"] if isinstance(answer["json"], list) else [answer["json"]]


def unknown(value: Any, fields: Fields | None, path: str = "") -> Iterator[str]:
    if fields is ANYTHING:
        return
    for item in value if isinstance(value, list) else [value]:
        for name, inner in item.items() if isinstance(item, dict) else ():
            if name not in fields:
                yield f"{path}.{name}"
            else:
                yield from unknown(inner, fields[name], f"{path}.{name}")


def test_every_field_that_is_sent_can_be_asked_for() -> None:
    tables = [route.fields for route in ROUTES if route.fields is not None]
    checked = 0
    for answer in golden_answers():
        if "status" in answer:
            continue  # it is the operators' own
        assert any(not list(unknown(answer, fields)) for fields in tables), answer
        checked += 1
    assert checked > 100
