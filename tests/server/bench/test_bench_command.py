"""Options to a plan, or the one sentence that says what is wrong with them."""

from __future__ import annotations

import asyncio
import ssl
import sys
from pathlib import Path

import pytest

from benchmarks.harness import machine
from benchmarks.harness.beside import Beside, last_numbers
from benchmarks.harness.contenders import Sizes, castor, gguf_file, peer, versions
from benchmarks.harness.machine import Choice
from benchmarks.harness.programs import output_of
from engine.api.engine import EngineConfig
from server.bench.prompts import Prompts
from server.bench.results.measure import Limits
from server.bench.session import Plan
from server.bench.wire.client import BaseUrl, parse_url
from server.commands.bench import Options, plan_of, running_target, scenario_of, tls_reason
from server.config.errors import ConfigError
from server.config.models_file import ModelSpec
from server.config.settings import Settings

CPU = Choice("cpu", 2)


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
            "takes llama.cpp, llama.cpp-native as peers: leave out --peer trans",
        ),
        (
            {"scenario": "R1", "rates": (1.0,)},
            "--rate has no effect on the scenario R1, which takes --tokens, --requests, --seconds, --p",
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
    with pytest.raises(ConfigError, match=r"'vllm' is unknown; there are llama\.cpp, llama\.cpp-native, transformers"):
        peer("vllm", folder, settings, CPU)


def test_a_peer_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness.contenders.ENVIRONMENTS", tmp_path)
    settings = Settings(data_dir=tmp_path, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"run: \./scripts/bench --peer llama\.cpp"):
        peer("llama.cpp", ModelSpec("m", "/some/m.gguf"), settings, CPU)


def installed(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, says: str = "") -> None:
    """A peer whose Python says the same whatever it is asked."""
    python = folder / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho '{says}'\n")
    python.chmod(0o755)
    monkeypatch.setattr("benchmarks.harness.contenders.ENVIRONMENTS", folder)


def test_peers_compute_with_what_the_engine_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    installed(monkeypatch, tmp_path, "transformers")
    monkeypatch.chdir(tmp_path.parent)
    settings = Settings(data_dir=tmp_path, cache_dir=Path())

    def options(device: str, dtype: str = "auto") -> list[str]:
        spec = ModelSpec("m", tmp_path.name, dtype=dtype, base=Path())
        made = peer("transformers", spec, settings, Choice(device, 3))
        return made.command(1, Sizes(1, 1, 3))

    assert {"float32", "cpu", str(tmp_path)} <= set(options("cpu"))
    assert {"auto", "cuda:0"} <= set(options("cuda:0"))
    assert "bfloat16" in options("cpu", "bfloat16")


def test_what_llama_cpp_is_built_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, tmp_path, "llama.cpp", "CPU : AVX2 = 1 | FMA = 0 | ")
    installed(monkeypatch, tmp_path, "llama.cpp-native", "CUDA : ARCHS = 900 | CPU : AVX512 = 1 | ")
    monkeypatch.chdir(tmp_path)
    settings, spec = Settings(data_dir=tmp_path, cache_dir=Path()), ModelSpec("m", "m.gguf", base=Path())
    made = peer("llama.cpp", spec, settings, CPU)
    assert (made.build, made.weights) == ("CPU : AVX2 = 1 | FMA = 0 |", tmp_path / "m.gguf")
    with pytest.raises(
        ConfigError, match=r"on cuda:0, but this llama\.cpp is built for CPUs only: leave this peer out"
    ):
        peer("llama.cpp", spec, settings, Choice("cuda:0", 1))
    assert peer("llama.cpp-native", spec, settings, Choice("cuda:0", 1)).name == "llama.cpp-native"


@pytest.mark.parametrize(
    ("build", "flags", "words"),
    [
        ("CPU : AVX2 = 1 | FMA = 0 |", "avx2 avx512f", "! llama.cpp is compiled for AVX2: not for AVX-512, which"),
        ("CPU : AVX2 = 1 | FMA = 1 |", "avx2", "llama.cpp is compiled for AVX2, FMA"),
        ("CPU : AVX512 = 1 |", "avx512f", "llama.cpp is compiled for AVX512"),
    ],
)
def test_a_build_in_words(build: str, flags: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    assert machine.told("llama.cpp", "CPU : REPACK = 1").endswith("compiled for REPACK")
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags} sse\n")
    assert machine.told("llama.cpp", build).startswith(words)


def test_the_choice_is_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert machine.choice_of(ModelSpec("m", "/m", device="cpu")) == Choice("cpu", 1)
    with pytest.raises(ConfigError, match=r"castor's engine failed with status 1: .*device 'warp' is not known"):
        machine.choice_of(ModelSpec("m", "/m", device="warp"))


@pytest.mark.parametrize(
    ("url", "given", "sent"),
    [
        ("http://127.0.0.1:9", None, "own"),
        ("https://localhost", None, "own"),
        ("http://example.org", None, None),
        ("https://example.org", None, None),
        ("https://example.org", "named", "named"),
    ],
)
async def test_only_this_machine_gets_a_key_that_was_not_named_for_it(
    url: str, given: str | None, sent: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    async def answer(_url: BaseUrl, _path: str, headers: dict[str, str]) -> tuple[int, bytes]:
        seen.append(headers.get("x-goog-api-key"))
        return 200, b'{"models": [{"name": "models/m"}]}'

    monkeypatch.setattr("server.commands.bench.get", answer)
    target = await running_target(Options(url=url, api_key=given), url, "own")
    assert seen == [sent]
    assert target.api_key == sent


async def test_a_server_without_tls() -> None:
    async def handle(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as listening:
        url = f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"no TLS with https://127.*does it speak http:// instead\?"):
            await running_target(Options(url=url), url)


def test_a_certificate_that_is_not_accepted() -> None:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = "self-signed certificate"
    assert tls_reason(error) == "its certificate is not accepted: self-signed certificate"


def test_the_python_of_a_peer_that_is_broken(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\necho gone >&2\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(ConfigError, match="failed with status 3: gone"):
        versions(tmp_path / "python", ())
    with pytest.raises(ConfigError, match="cannot be run: No such file"):
        versions(tmp_path / "nothing", ())


def test_programs_that_do_not_answer() -> None:
    with pytest.raises(ConfigError, match="slow did not end within 0 s"):
        output_of("slow", [sys.executable, "-c", "import time; time.sleep(60)"], "", 0.3)
    assert last_numbers("good", 'words\n{"a": 1}\n') == {"a": 1.0}
    for said in ("", "words", "[1]", '{"a": "b"}', '{"a": null}'):
        with pytest.raises(ConfigError, match="bad did not end with a line of numbers"):
            last_numbers("bad", said)


def test_a_bare_core_that_fails_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness.beside._numbers", lambda *_: {"failed": 2.0})
    beside = Beside(EngineConfig(path=""), Plan("frontend", (4,), tokens=4), Prompts(0))
    with pytest.raises(ConfigError, match="the bare core failed 2 requests with 4 streams"):
        beside.run("bare_core.py", 0)
