"""Options to a plan, or the one sentence that says what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.bench.client import BaseUrl, parse_url
from server.bench.contenders import castor, gguf_file, peer, versions
from server.bench.measure import Limits
from server.commands.bench import Options, plan_of, scenario_of
from server.settings import ConfigError, Settings
from server.spec import ModelSpec


def plan(**options: object) -> object:
    given = Options(**options)  # type: ignore[arg-type]
    return plan_of(given, scenario_of(given))


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:8080", BaseUrl("http", "127.0.0.1", 8080, "")),
        ("http://localhost:1/genai/", BaseUrl("http", "localhost", 1, "/genai")),
        ("https://example.org", BaseUrl("https", "example.org", 443, "")),
        ("http://[::1]:80", BaseUrl("http", "::1", 80, "")),
    ],
)
def test_urls(text: str, url: BaseUrl) -> None:
    assert parse_url(text) == url
    assert parse_url(str(url)) == url


@pytest.mark.parametrize("text", ["127.0.0.1:8080", "ftp://x", "http://", "http://x:y", "http://x?key=k", "http://u@x"])
def test_what_is_no_url(text: str) -> None:
    with pytest.raises(ConfigError, match="write it like http://127"):
        parse_url(text)


def test_sizes_of_options_replace_those_of_the_scenario() -> None:
    made = plan_of(
        Options(scenario="R2", streams=(3,), tokens=5, rounds=1, ttft_limit=9.0), scenario_of(Options(scenario="R2"))
    )
    assert (made.streams, made.tokens, made.rounds, made.prompt_tokens, made.seed) == ((3,), 5, 1, 128, 0)
    assert made.limits == Limits(9.0, 0.2)
    seeds = {plan_of(Options(url="http://x"), scenario_of(Options())).seed for _ in range(20)}
    assert len(seeds) > 1, "a server that was measured before remembers its prompts"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scenario": "R8"}, "'R8' is unknown; there are throughput, R1"),
        ({"url": "http://x", "peers": ("llama.cpp",)}, "leave out either the URL or --peer"),
        ({"url": "http://x", "scenario": "R7"}, "./scripts/bench --scenario R7"),
        ({"scenario": "frontend", "peers": ("llama.cpp",)}, "looks into Castor itself: leave out --peer llama.cpp"),
        (
            {"scenario": "R5", "peers": ("transformers",)},
            "takes llama.cpp as peers: leave out --peer trans",
        ),
        (
            {"scenario": "R1", "rates": (1.0,)},
            "--rate has no effect on the scenario R1, which takes --tokens, --req",
        ),
        ({"scenario": "R6", "streams": (1, 2)}, "--streams is given 2 times, but the scenario R6 takes it once"),
        ({"seed": -1}, "--seed is -1"),
        ({"rates": (float("nan"),)}, "--rate is nan"),
        ({"streams": (4, 0)}, "--streams is 0, but must be at least 1"),
        ({"rounds": 0}, "--rounds is 0"),
        ({"shares": (0.0,)}, "--share is 0, but must be at least 0.001"),
    ],
)
def test_options_that_cannot_be_served(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        plan(**options)
    assert words in str(raised.value)


def test_contenders(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    settings = Settings(data_dir=tmp_path, cache_dir=tmp_path)
    folder = ModelSpec("m", str(tmp_path))
    ours = castor(folder, settings, tmp_path / "models.yaml")
    assert {"--host", "127.0.0.1", "--models"} <= set(ours.command(1, None))  # type: ignore[arg-type]
    assert ours.weights == tmp_path
    assert versions(ours.python, ("starlette", "no-such-package")).keys() == {"python", "starlette"}
    with pytest.raises(ConfigError, match=r"needs a GGUF file, but the source of m is .*leave this peer out"):
        gguf_file(folder, settings)
    assert gguf_file(ModelSpec("m", "/some/m.gguf"), settings) == Path("/some/m.gguf")
    with pytest.raises(ConfigError, match=r"'vllm' is unknown; there are llama\.cpp, transformers"):
        peer("vllm", folder, settings)


def test_a_peer_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.bench.contenders.ENVIRONMENTS", tmp_path)
    settings = Settings(data_dir=tmp_path, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"run: \./scripts/bench --peer llama\.cpp"):
        peer("llama.cpp", ModelSpec("m", "/some/m.gguf"), settings)
