"""Quantised weights through HTTP, as they are published and packed at the load; numbers are the reference ring's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.published import published_fp8, published_mxfp4, saved_small
from support.server import RunningServer, running_server
from support.waiting import wait_until

pytestmark = [pytest.mark.product, pytest.mark.timeout(600)]

MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
PUBLISHED: dict[str, tuple[str, dict[str, Any], Callable[[Path], Path]]] = {
    "fp8": ("qwen3", {}, published_fp8),
    "fp8-experts": ("qwen3_moe", MIXTURE, published_fp8),
    "mxfp4": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}, published_mxfp4),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    place = tmp_path_factory.mktemp("packed")
    models: dict[str, dict[str, Any]] = {}
    common = {"load": "request", "kv_memory": 20_000_000, "max_running": 4, "device": "cpu"}
    for name, (model_type, settings, publish) in PUBLISHED.items():
        publish(saved_small(place / name, model_type, **settings))
        models[name] = {"source": str(place / name), **common}
    models["q8"] = {"source": str(saved_small(place / "q8", "llama")), "quantize": "q8", **common}
    (place / "models.yaml").write_text(yaml.safe_dump({"models": models}))
    with running_server(place, "--models", str(place / "models.yaml")) as running:
        yield running


@pytest.mark.parametrize("name", [*PUBLISHED, "q8"])
def test_a_model_answers_alike_twice(name: str, server: RunningServer) -> None:
    config = {"maxOutputTokens": 24, "temperature": 0}
    body = {"contents": [{"role": "user", "parts": [{"text": "Hello, how are you?"}]}], "generationConfig": config}
    wait_until(lambda: server.generate(body, model=name).status_code == 200, seconds=180)
    first, second = (server.generate(body, model=name).json() for _ in range(2))
    assert first["usageMetadata"]["candidatesTokenCount"] > 0
    assert first["candidates"] == second["candidates"]
