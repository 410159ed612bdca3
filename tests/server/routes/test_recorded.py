"""Requests recorded from real clients: each is answered, or refused by a documented error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fakes import INFO, serving, tokenizer_folder

from server.config.models_file import ModelSpec

RECORDED = Path(__file__).parents[2] / "data" / "recorded_requests.jsonl"
ROWS = [json.loads(line) for line in RECORDED.read_text("utf-8").splitlines()]
GENERATION = [row for row in ROWS if row["path"].split("?")[0].endswith(("enerateContent", ":countTokens"))]
REFUSED = {
    "generate_system_config": (400, "thinkingBudget"),
    "generateContentStream": (400, "thinkingBudget"),
    "generate_toolconfig_any": (501, "googleSearch"),
    "generateContent_tools": (400, "inline_data: image/png: this model reads text"),
    "generate_image_bytes": (400, "inline_data: image/png: this model reads text"),
    "generate_file_uri": (403, "You do not have permission to access the File abc123"),
    "batches_create_inline": (501, "batchGenerateContent"),
    "batches_create_file": (501, "batchGenerateContent"),
    "batches_create": (501, "batchGenerateContent"),
}


@pytest.mark.parametrize("row", GENERATION, ids=lambda row: row["case"])
async def test_recorded_generation(tmp_path: Path, row: dict[str, Any]) -> None:
    folder = tokenizer_folder(tmp_path / "tiny")
    spec = ModelSpec("tiny", str(folder), aliases=("m1", "fc", "jsonout", "s-think", "e1"))
    async with serving(folder, [spec]) as harness:
        harness.engine.info = replace(INFO, max_context=65_536)  # a token is a character
        response = await harness.client.request(row["method"], row["path"], json=row["body"])
    expected = REFUSED.get(row["case"].partition(":")[2])
    if expected is None:
        assert response.status_code == 200, response.text
        return
    code, field = expected
    assert response.status_code == code
    assert field in response.json()["error"]["message"]


async def test_no_recorded_request_is_our_failure(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "tiny")
    spec = ModelSpec("tiny", str(folder), aliases=("m1", "fc", "jsonout", "s-think", "e1", "err-mid"))
    async with serving(folder, [spec]) as harness:
        for row in ROWS:
            response = await harness.client.request(row["method"], row["path"], json=row["body"])
            assert response.status_code in (200, 400, 403, 404, 501), (row["case"], response.text)
