"""The settings of a request against the real server: seeds, shared prompts, and what the built-in entry lets pass."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.server import RunningServer

pytestmark = pytest.mark.product

QUESTION = "Tell me a story about a dragon."


def body(**config: Any) -> dict[str, Any]:
    return {"contents": QUESTION, "generationConfig": {"maxOutputTokens": 8, **config}}


def text_of(castor: RunningServer, seed: int) -> str:
    sampled = body(seed=seed, temperature=1.1, topP=0.95, topK=64.0, presencePenalty=0.3, frequencyPenalty=0.3)
    return castor.generate(sampled).json()["candidates"][0]["content"]["parts"][0]["text"]


def test_a_seed_gives_the_same_answer_alone_and_under_load(castor: RunningServer) -> None:
    alone = {seed: text_of(castor, seed) for seed in (1, 2)}
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda seed: text_of(castor, seed), [1, 3, 2, 4, 5, 1, 6, 2]))
    assert [together[place] for place in (0, 2, 5, 7)] == [alone[1], alone[2], alone[1], alone[2]]
    assert len(set(together)) == 6


def test_eight_candidates_share_their_prompt(castor: RunningServer) -> None:
    answer = castor.generate(body(candidateCount=8, temperature=1, seed=5, maxOutputTokens=4)).json()
    assert [candidate["index"] for candidate in answer["candidates"]] == list(range(8))
    usage = answer["usageMetadata"]
    assert (
        usage["promptTokenCount"]
        == castor.generate(body(maxOutputTokens=1)).json()["usageMetadata"]["promptTokenCount"]
    )
    assert usage["candidatesTokenCount"] == sum(candidate["tokenCount"] for candidate in answer["candidates"])
    assert usage["totalTokenCount"] == usage["promptTokenCount"] + usage["candidatesTokenCount"]


@pytest.mark.parametrize(
    ("thinking", "named"),
    [
        ({"thinkingBudget": 128, "includeThoughts": True}, "generationConfig.thinkingConfig.thinkingBudget"),
        ({"thinking_level": "low"}, "generationConfig.thinkingConfig.thinkingLevel"),
        ({"thinkingBudget": 0, "includeThoughts": True}, None),
    ],
)
def test_the_builtin_entry_lets_thinking_pass(
    castor: RunningServer, thinking: dict[str, Any], named: str | None
) -> None:
    counted = castor.metric("castor_ignored_fields_total", field=named or "")
    answer = castor.generate(body(thinkingConfig=thinking, maxOutputTokens=1))
    assert answer.status_code == 200, answer.text
    assert answer.headers.get("x-castor-ignored") == named
    assert castor.metric("castor_ignored_fields_total", field=named or "") == counted + (named is not None)


def test_a_model_that_cannot_think_says_so(castor: RunningServer) -> None:
    assert castor.client.get("/v1beta/models/smollm2-135m-instruct").json()["thinking"] is False
