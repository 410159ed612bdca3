"""One model of each kind through HTTP: streams of which half are cancelled, and answers as of any other model."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import yaml
from support.fates import lively_class_folder
from support.server import RunningServer, running_server
from support.tiny import save_tiny_tokenizer
from support.waiting import wait_until

pytestmark = [pytest.mark.product, pytest.mark.timeout(600)]

KINDS = {
    "composite": "Gemma4ForConditionalGeneration",
    "delta-net": "Qwen3_5ForConditionalGeneration",
    "mamba": "NemotronHForCausalLM",
    "convolution": "Lfm2ForCausalLM",
    "latent": "Glm4MoeLiteForCausalLM",
    "windows": "GptOssForCausalLM",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """All kinds in one server; each is loaded when it is asked for first."""
    place = tmp_path_factory.mktemp("kinds")
    models = {}
    for name, model_class in KINDS.items():
        lively_class_folder(place / name, model_class)
        save_tiny_tokenizer(place / name)
        models[name] = {
            "source": str(place / name),
            "load": "request",
            "kv_memory": 40_000_000,
            "max_running": 8,
        }
    (place / "models.yaml").write_text(yaml.safe_dump({"models": models}))
    with running_server(place, "--models", str(place / "models.yaml")) as running:
        yield running


def body(text: str, **config: Any) -> dict[str, Any]:
    return {"contents": [{"role": "user", "parts": [{"text": text}]}], "generationConfig": config}


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_streams_of_which_half_are_cancelled(kind: str, server: RunningServer) -> None:
    wait_until(lambda: server.generate(body("Hello", maxOutputTokens=2), model=kind).status_code == 200, seconds=120)

    def stream(number: int) -> int:
        """How many events a client reads; every other one hangs up after the first."""
        asked = body(
            f"Tell me about {'one thing ' * (number % 5)}{number}.", maxOutputTokens=40, temperature=1, seed=number
        )
        read = 0
        path = f"/v1beta/models/{kind}:streamGenerateContent?alt=sse"
        with server.client.stream("POST", path, json=asked) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                read += line.startswith("data: ")
                if read and number % 2:
                    break
        return read

    with ThreadPoolExecutor(16) as clients:
        read = list(clients.map(stream, range(16)))
    assert all(read)

    def is_free() -> bool:
        used = (
            "castor_kv_blocks_used",
            "castor_state_slots_used",
            "castor_sequences_running",
            "castor_sequences_waiting",
        )
        return not any(server.metric(name, model=kind) for name in used)

    wait_until(is_free)
    assert "were not given back" not in server.log()


@pytest.mark.parametrize("kind", KINDS)
def test_counts_logprobs_candidates_and_seeds(kind: str, server: RunningServer) -> None:
    asked = body(
        "What is the capital of France?",
        maxOutputTokens=8,
        temperature=1,
        seed=7,
        candidateCount=2,
        responseLogprobs=True,
        logprobs=3,
    )
    first, second = (server.generate(asked, model=kind).json() for _ in range(2))
    assert [c["content"] for c in first["candidates"]] == [c["content"] for c in second["candidates"]]
    assert len(first["candidates"]) == 2
    counted = server.client.post(f"/v1beta/models/{kind}:countTokens", json={"contents": asked["contents"]}).json()
    usage = first["usageMetadata"]
    assert counted["totalTokens"] == usage["promptTokenCount"]
    assert usage["totalTokenCount"] == usage["promptTokenCount"] + usage["candidatesTokenCount"]
    for one, other in zip(first["candidates"], second["candidates"], strict=True):
        chosen, again = (c["logprobsResult"]["chosenCandidates"] for c in (one, other))
        assert len(chosen) == one["tokenCount"]
        for mine, theirs in zip(chosen, again, strict=True):
            assert mine["logProbability"] == pytest.approx(theirs["logProbability"], abs=1e-3)
        top = one["logprobsResult"]["topCandidates"][0]["candidates"]
        assert len(top) == 3
        assert top[0]["logProbability"] >= chosen[0]["logProbability"] - 1e-3


@pytest.mark.parametrize("kind", ["delta-net", "mamba", "convolution"])
def test_a_later_turn_begins_where_states_were_kept(kind: str, server: RunningServer) -> None:
    history: list[dict[str, Any]] = []
    cached = 0
    for turn in range(4):
        history.append(
            {"role": "user", "parts": [{"text": f"Question {turn} of this long conversation, please answer."}]}
        )
        answer = server.generate(
            {"contents": history, "generationConfig": {"maxOutputTokens": 6, "seed": 1}}, model=kind
        )
        usage = answer.json()["usageMetadata"]
        if turn:
            assert usage["cachedContentTokenCount"] >= cached
        cached = usage["promptTokenCount"] - 40
        history.append({"role": "model", "parts": [{"text": "An answer."}]})
    assert server.metric("castor_state_snapshots", model=kind) > 0
