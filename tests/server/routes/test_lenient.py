"""Fields that an operator lets pass: accepted without effect, named in the answer, counted; all else stays strict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.fakes import serving, tokenizer_folder

from server.config.models_file import ModelSpec

BUDGET = "generationConfig.thinkingConfig.thinkingBudget"
THINKING = {"contents": "hi", "generationConfig": {"thinkingConfig": {"thinkingBudget": 512, "includeThoughts": True}}}


def spec_of(folder: Path, *lenient: str) -> ModelSpec:
    return ModelSpec("tiny", str(folder), lenient=lenient)


async def test_each_use_is_named_and_counted(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "tiny")
    async with serving(folder, [spec_of(folder, BUDGET)]) as harness:
        whole = await harness.generate(THINKING)
        streamed = await harness.stream(THINKING)
        counted = await harness.count({"generateContentRequest": THINKING})
        metrics = (await harness.client.get("/metrics")).text
    assert [answer.status_code for answer in (whole, streamed, counted)] == [200, 200, 200]
    assert whole.headers["x-castor-ignored"] == streamed.headers["x-castor-ignored"] == BUDGET
    assert counted.headers["x-castor-ignored"] == f"generateContentRequest.{BUDGET}"
    assert f'castor_ignored_fields_total{{field="{BUDGET}"}} 3.0' in metrics


async def test_without_the_entry_the_model_is_strict(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "tiny")
    async with serving(folder, [spec_of(folder)]) as harness:
        refused = await harness.generate(THINKING)
        free = await harness.generate({**THINKING, "generationConfig": {"thinkingConfig": {"thinkingBudget": 0}}})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith(f"{BUDGET} 512: this model cannot think")
    assert (free.status_code, "x-castor-ignored" in free.headers) == (200, False)


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        ("tools.googleSearch", {"tools": [{"googleSearch": {}}]}),
        ("cachedContent", {"cachedContent": "cachedContents/x"}),
        ("generationConfig", {"generationConfig": {"speechConfig": {"languageCode": "de"}, "temperature": 0.5}}),
        ("systemInstruction", {"systemInstruction": {"parts": [{"inlineData": {"data": "AAAA"}}]}}),
    ],
)
async def test_what_is_let_pass_changes_nothing(tmp_path: Path, path: str, extra: dict[str, Any]) -> None:
    folder = tokenizer_folder(tmp_path / "tiny")
    async with serving(folder, [spec_of(folder, path)]) as harness:
        plain = await harness.generate({"contents": "hi"})
        answer = await harness.generate({"contents": "hi", **extra})
        first, second = harness.engine.requests
    assert plain.status_code == answer.status_code == 200, answer.text
    assert first.prompt == second.prompt
    assert first.sampling.temperature == second.sampling.temperature
    assert answer.headers["x-castor-ignored"].startswith(path.partition(".")[0])
