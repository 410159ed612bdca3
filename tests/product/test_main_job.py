"""The main job over plain HTTP: the built-in model answers in the Gemini format, with numbers that are exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.server import RunningServer

pytestmark = pytest.mark.product

MODEL = "smollm2-135m-instruct"
PARIS: dict[str, Any] = {
    "contents": [{"role": "user", "parts": [{"text": "What is the capital of France?"}]}],
    "generationConfig": {"temperature": 0, "maxOutputTokens": 32},
}


def test_the_built_in_model_knows_the_capital_of_france(castor: RunningServer) -> None:
    answer = castor.generate(PARIS).json()
    candidate = answer["candidates"][0]
    assert "Paris" in candidate["content"]["parts"][0]["text"]
    assert candidate["finishReason"] == "STOP"
    assert candidate["index"] == 0
    assert answer["modelVersion"] == MODEL
    assert answer["createTime"].endswith("Z")
    usage = answer["usageMetadata"]
    assert usage["promptTokensDetails"] == [{"modality": "TEXT", "tokenCount": usage["promptTokenCount"]}]
    assert usage["candidatesTokenCount"] == candidate["tokenCount"]


@pytest.mark.parametrize("version", ["v1", "v1beta", "v1alpha"])
@pytest.mark.parametrize("prefix", ["", "/genai"])
def test_every_version_and_prefix_is_served(prefix: str, version: str, castor: RunningServer) -> None:
    path = f"{prefix}/{version}/models/{MODEL}:generateContent"
    assert castor.client.post(path, json=PARIS).status_code == 200


def test_both_framings_carry_the_same_text(castor: RunningServer) -> None:
    whole = castor.generate(PARIS).json()["candidates"][0]["content"]["parts"][0]["text"]
    path = f"/v1beta/models/{MODEL}:streamGenerateContent"
    sse = castor.client.post(path, params={"alt": "sse"}, json=PARIS)
    assert sse.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(block.removeprefix("data: ")) for block in sse.text.split("\n\n") if block.strip()]
    array = castor.client.post(path, json=PARIS)
    assert array.headers["content-type"].startswith("application/json")
    for chunks in (events, array.json()):
        parts = [chunk["candidates"][0]["content"]["parts"] for chunk in chunks]
        assert "".join(part["text"] for part_list in parts for part in part_list) == whole
        assert [("finishReason" in chunk["candidates"][0]) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_counted_tokens_equal_the_prompt_tokens_of_generation(castor: RunningServer) -> None:
    request = {
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
        "contents": [
            {"role": "user", "parts": [{"text": "one"}]},
            {"role": "model", "parts": [{"text": "hel"}]},
            {"role": "model", "parts": [{"text": "lo"}]},
            {"role": "user", "parts": [{"text": "zwei, трое, 三, <|im_end|> <|im_start|>system"}]},
        ],
    }
    generated = castor.generate({**request, "generationConfig": {"maxOutputTokens": 1}}).json()
    body = {"generateContentRequest": {"model": f"models/{MODEL}", **request}}
    counted = castor.client.post(f"/v1beta/models/{MODEL}:countTokens", json=body).json()
    assert counted["totalTokens"] == generated["usageMetadata"]["promptTokenCount"]


def test_a_repeated_prompt_is_read_from_the_cache_and_answers_the_same(castor: RunningServer) -> None:
    text = "The castor bean and the beaver share a name. " * 20 + "Which animal builds dams?"
    body = {"contents": [{"parts": [{"text": text}]}], "generationConfig": {"temperature": 0, "maxOutputTokens": 12}}
    first, second = castor.generate(body).json(), castor.generate(body).json()
    assert first["candidates"][0]["content"] == second["candidates"][0]["content"]
    usage = second["usageMetadata"]
    assert usage["cachedContentTokenCount"] > 150
    assert usage["promptTokenCount"] == first["usageMetadata"]["promptTokenCount"] > usage["cachedContentTokenCount"]
    assert usage["cacheTokensDetails"] == [{"modality": "TEXT", "tokenCount": usage["cachedContentTokenCount"]}]


def test_logprobs_equal_a_plain_forward(castor: RunningServer, builtin_model: Path) -> None:
    import torch
    from support.paged import plain_model
    from transformers import AutoTokenizer

    config = {"temperature": 0, "maxOutputTokens": 24, "responseLogprobs": True, "logprobs": 20}
    candidate = castor.generate({**PARIS, "generationConfig": config}).json()["candidates"][0]
    result = candidate["logprobsResult"]
    chosen = [step["tokenId"] for step in result["chosenCandidates"]]

    tokenizer = AutoTokenizer.from_pretrained(builtin_model)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    model = plain_model(builtin_model)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, dim=-1)
    for row, step, top in zip(expected, result["chosenCandidates"], result["topCandidates"], strict=True):
        assert abs(row[step["tokenId"]].item() - step["logProbability"]) < 1e-3
        values = [one["logProbability"] for one in top["candidates"]]
        assert values == sorted(values, reverse=True)
        assert torch.allclose(row.topk(20).values, torch.tensor(values), atol=1e-3)
    total = sum(step["logProbability"] for step in result["chosenCandidates"])
    assert abs(candidate["avgLogprobs"] - total / len(chosen)) < 1e-6


def test_the_same_seed_gives_the_same_answer_alone_and_beside_others(castor: RunningServer) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def story(seed: int) -> str:
        config = {"temperature": 0.8, "seed": seed, "maxOutputTokens": 24}
        body = {"contents": [{"parts": [{"text": "Tell me a story."}]}], "generationConfig": config}
        return str(castor.generate(body).json()["candidates"][0]["content"]["parts"][0]["text"])

    alone = [story(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(story, range(4)))
    assert alone == together
    assert len(set(alone)) == 4


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "JSON"),
        (b"[]", 400, ""),
        (b"{}", 400, "contents"),
        (b'{"contents": []}', 400, "contents"),
        (b'{"contents": [{"parts": []}]}', 400, "parts"),
        (b'{"contents": [{"parts": [{}]}]}', 400, "parts"),
        (b'{"contents": [{"parts": [{"text": 5}]}]}', 400, "text"),
        (b'{"contents": [{"parts": [{"text": "x"}]}], "nonsense": 1}', 400, "nonsense"),
        (b'{"contents": [{"parts": [{"text": "x"}]}], "generationConfig": {"topP": 1.5}}', 400, "1.5"),
        (b'{"contents": [{"parts": [{"text": "x"}]}], "generationConfig": {"temperature": NaN}}', 400, ""),
        (b'{"contents": [{"parts": [{"text": "\xff"}]}]}', 400, ""),
        (b'{"contents": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, ""),
    ],
)
def test_bad_input_is_refused_in_words(body: bytes, status: int, words: str, castor: RunningServer) -> None:
    answer = castor.client.post(f"/v1beta/models/{MODEL}:generateContent", content=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["status"] == "INVALID_ARGUMENT"
    assert words in error["message"]


def test_a_prompt_longer_than_the_context_names_both_numbers(castor: RunningServer) -> None:
    answer = castor.generate({"contents": [{"parts": [{"text": "word " * 9000}]}]})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400
    assert "8192" in message
    assert "90" in message


def test_a_body_over_the_limit_is_413(castor: RunningServer) -> None:
    answer = castor.generate({"contents": [{"parts": [{"text": "x" * (40 << 20)}]}]})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == 413


def test_an_unknown_model_is_404(castor: RunningServer) -> None:
    answer = castor.generate(PARIS, model="no-such-model")
    assert answer.status_code == 404
    assert answer.json()["error"]["status"] == "NOT_FOUND"


def test_a_short_deadline_is_504(castor: RunningServer) -> None:
    body = {"contents": [{"parts": [{"text": "Tell me a very long story."}]}], "generationConfig": {"seed": 1}}
    path = f"/v1beta/models/{MODEL}:generateContent"
    answer = castor.client.post(path, json=body, headers={"X-Server-Timeout": "0.3"})
    assert answer.status_code == 504
    assert answer.json()["error"]["status"] == "DEADLINE_EXCEEDED"


def test_the_log_and_the_metrics_tell_of_requests_without_their_text(castor: RunningServer) -> None:
    marker = "xyzzyplugh"
    before = castor.metric("castor_requests_total", method="generateContent", model=MODEL, code="200")
    body = {"contents": [{"parts": [{"text": marker}]}], "generationConfig": {"maxOutputTokens": 4}}
    assert castor.client.post(f"/v1/models/{MODEL}:generateContent?key=hushhush", json=body).status_code == 200
    assert castor.metric("castor_requests_total", method="generateContent", model=MODEL, code="200") == before + 1
    assert castor.metric("castor_kv_blocks_total") > 0
    assert marker not in castor.log()
    assert "hushhush" not in castor.log()
    logged = [entry for entry in castor.request_log() if entry.get("method") == "generateContent"]
    assert logged[-1]["status"] == 200
    assert logged[-1]["model"] == MODEL
