"""docs/api.md tells the fate of every field: of the discovery document, and of what real clients were seen to send."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.grammar.schema_dialects import JSON_SCHEMA, NO_EFFECT, OPENAPI
from server.routes import MODEL_METHODS

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
DISCOVERY = json.loads((DATA / "discovery_fields.json").read_text("utf-8"))
RECORDED = [json.loads(line) for line in (DATA / "recorded_requests.jsonl").read_text("utf-8").splitlines()]
FATES = {"honoured", "refused", "accepted without effect"}
REQUESTS = {
    "models.generateContent": "GenerateContentRequest",
    "models.streamGenerateContent": "GenerateContentRequest",
    "models.countTokens": "CountTokensRequest",
    "models.list": "ListModelsRequest",
    "models.get": "",
    "files.list": "ListFilesRequest",
    "files.get": "",
    "files.delete": "",
    "media.upload": "CreateFileRequest",
}
FIELDS = {"models.get": 0, "models.list": 2, "files.list": 2, "files.get": 0, "files.delete": 0, "media.upload": 15}
"""At least so many fields are walked; those of generation methods are 150 and more."""


class Page:
    """The tables of docs/api.md as a reader has them: rows by message, and the fields in which each message stands."""

    def __init__(self, text: str) -> None:
        self.rows: dict[str, dict[str, str]] = {}
        self.messages: dict[str, str] = {}
        self.silent: list[str] = []
        for section in text.split("\n## ")[1:]:
            title, _, body = section.partition("\n")
            cells = [line.split(" | ") for line in body.splitlines() if line.startswith("| ")]
            self.rows[title] = {row[0].removeprefix("| "): row[1] for row in cells[2:]}
            self.silent += [f"{title} {row[0]}" for row in cells[2:] if not row[-1].rstrip("| ")]
            for place in re.findall(r"\b[A-Z]\w+\.\w+", body.partition("\n| ")[0]):
                self.messages[place] = title

    def fate(self, message: str, fields: list[str]) -> str | None:
        """What the page says of a field; None if it knows it not. A row without a table below it holds all below."""
        for field in fields:
            found = self.rows[message].get(field)
            inner = self.messages.get(f"{message}.{field}")
            if found is None or inner is None:
                return found
            message = inner
        return found


@pytest.fixture(scope="module")
def page() -> Page:
    return Page((ROOT / "docs" / "api.md").read_text("utf-8"))


def test_the_page_is_what_the_wire_types_say() -> None:
    command = [sys.executable, ROOT / "scripts" / "api-table", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_reads_as_it_is_meant(page: Page) -> None:
    config = ["generationConfig"]
    assert page.fate("GenerateContentRequest", [*config, "temperature"]) == "honoured"
    assert page.fate("GenerateContentRequest", [*config, "speechConfig", "voiceConfig"]) == "refused"
    assert page.fate("GenerateContentRequest", ["safetySettings", "category"]) == "accepted without effect"
    assert page.fate("CountTokensRequest", ["generateContentRequest", "store"]) == "accepted without effect"
    assert page.fate("GenerateContentRequest", ["contents", "parts", "madeUp"]) is None
    assert page.fate("GenerateContentRequest", [*config, "thinkingConfig", "madeUp"]) is None


def test_every_row_says_why(page: Page) -> None:
    assert page.silent == []


def described(schema: str, seen: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """The path of every field of a discovery schema; a schema within itself is walked once."""
    for field, inner in DISCOVERY["schemas"][schema].items():
        yield [field]
        if inner and inner not in seen:
            yield from ([field, *below] for below in described(inner, (*seen, schema)))


def test_every_method_of_the_discovery_document_is_walked() -> None:
    assert set(DISCOVERY["methods"]) == set(REQUESTS)
    of_models = {name.removeprefix("models.") for name in REQUESTS if name.startswith("models.")}
    assert of_models == {*MODEL_METHODS, "list", "get"}


@pytest.mark.parametrize("method", DISCOVERY["methods"])
def test_every_field_of_the_discovery_document_has_one_fate(method: str, page: Page) -> None:
    request = DISCOVERY["methods"][method]
    paths = [[name] for name in request["query"]] + list(described(request["request"]) if request["request"] else [])
    fates = {".".join(path): page.fate(REQUESTS[method], path) for path in paths}
    assert {path: fate for path, fate in fates.items() if fate not in FATES} == {}
    assert len(fates) >= FIELDS.get(method, 150)


def camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(word[:1].upper() + word[1:] for word in rest)


def sent(body: Any, page: Page, message: str) -> Iterator[list[str]]:
    """The path of every field in a recorded body, as far down as messages go; below is data of the user."""
    for name, value in body.items():
        field = camel(name)
        yield [field]
        inner = page.messages.get(f"{message}.{field}")
        for element in value if isinstance(value, list) else [value]:
            if inner and isinstance(element, dict):
                yield from ([field, *below] for below in sent(element, page, inner))


@pytest.mark.parametrize("row", RECORDED, ids=lambda row: row["case"])
def test_every_field_that_clients_sent_has_one_fate(row: dict[str, Any], page: Page) -> None:
    path = row["path"].partition("?")[0]
    served = next((f"models.{verb}" for verb in MODEL_METHODS if path.endswith(f":{verb}")), None)
    if re.search(r"\bfiles\b", path):
        command = {name.lower(): value for name, value in row["headers"].items()}.get("x-goog-upload-command")
        if command != "start":
            return  # the others have no body of JSON
        served = "media.upload"
    if served is None:
        refused = " ".join(name for name, fate in page.rows["Methods"].items() if fate.startswith("refused"))
        known = [word for word in re.split(r"[/:]", path) if word and re.search(rf"\b{word}\b", refused)]
        assert known or path.rpartition("/v1/")[2].startswith("models")
        return
    message = REQUESTS[served]
    fates = {".".join(path): page.fate(message, path) for path in sent(row["body"], page, message)}
    assert fates
    assert {path: fate for path, fate in fates.items() if fate not in FATES} == {}


def test_every_field_of_a_schema_has_one_fate() -> None:
    fates = [set(OPENAPI.names), set(OPENAPI.annotations)]
    for field in DISCOVERY["schemas"]["Schema"]:
        assert sum(field in names for names in fates) == 1, field
    assert set(NO_EFFECT) <= set(JSON_SCHEMA.names) <= set(OPENAPI.names) | {"propertyOrdering"}
