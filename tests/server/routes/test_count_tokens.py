"""countTokens: both forms, equal to what a generation reports."""

from __future__ import annotations

from typing import Any

import pytest
from support.fakes import INFO, Harness

from server.convert.prompt import COUNTED_CHARACTERS

HI: dict[str, Any] = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}
SYSTEM = {"systemInstruction": {"parts": [{"text": "be brief"}]}}
CHAT = {
    "contents": [
        {"role": "user", "parts": [{"text": "one"}]},
        {"role": "model", "parts": [{"text": "hel"}]},
        {"role": "model", "parts": [{"text": "lo"}]},
        {"role": "user", "parts": [{"text": "two"}]},
    ]
}


@pytest.mark.parametrize("body", [HI, HI | SYSTEM, CHAT, CHAT | SYSTEM])
@pytest.mark.parametrize("wrapped", [False, True])
async def test_the_count_is_that_of_a_generation(harness: Harness, body: dict[str, Any], wrapped: bool) -> None:
    asked = {"generateContentRequest": {"model": "models/tiny", **body}} if wrapped else body
    counted = await harness.count(asked)
    generated = await harness.generate(body)
    total = generated.json()["usageMetadata"]["promptTokenCount"]
    assert counted.json() == {
        "totalTokens": total,
        "promptTokensDetails": [{"modality": "TEXT", "tokenCount": total}],
    }
    assert total == len(harness.engine.requests[0].prompt)


async def test_contents_beside_a_wrapped_request_do_not_count(harness: Harness) -> None:
    both = await harness.count({**CHAT, "generateContentRequest": HI})
    assert both.json() == (await harness.count(HI)).json()


async def test_what_is_over_the_context_is_counted(harness: Harness) -> None:
    response = await harness.count({"contents": "x" * 200_000})
    assert response.json()["totalTokens"] > 200_000 > INFO.max_context


async def test_what_would_take_gigabytes_is_not_counted(harness: Harness) -> None:
    response = await harness.count({"contents": "x" * (COUNTED_CHARACTERS + 1)})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == (
        "The input has 2000001 characters; at most 2000000 are counted at once. Count it in parts."
    )


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ({}, 400, "contents is not specified"),
        ({**HI, "foo": 1}, 400, 'Unknown name "foo"'),
        ({**HI, "tools": [{"googleSearch": {}}]}, 501, "tools[0].googleSearch"),
        ({"generateContentRequest": {**HI, "cachedContent": "cachedContents/x"}}, 501, "cachedContent"),
        ({"generateContentRequest": {**HI, "model": "models/nobody"}}, 404, "models/nobody"),
    ],
)
async def test_refusals(harness: Harness, body: dict[str, Any], code: int, text: str) -> None:
    response = await harness.count(body)
    assert response.status_code == code
    assert text in response.json()["error"]["message"]


async def test_the_deadline_holds_for_counting_too(harness: Harness) -> None:
    for header, status in (("1e-9", 504), ("0", 400), ("soon", 400), ("60", 200)):
        answer = await harness.client.post("/v1/models/tiny:countTokens", json=HI, headers={"X-Server-Timeout": header})
        assert answer.status_code == status, answer.text


async def test_a_result_alone_is_counted_and_not_answered(harness: Harness) -> None:
    result = {"functionResponse": {"name": "f", "response": {"n": 1}}}
    asked = {"contents": [{"role": "USER", "parts": [result]}]}
    assert (await harness.count(asked)).json()["totalTokens"] > 0
    response = await harness.generate(asked)
    assert response.status_code == 400
    assert "immediately after a function call turn" in response.json()["error"]["message"]
