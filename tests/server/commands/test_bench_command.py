"""``castor bench URL``: what it refuses, the server it finds, and whole runs over a small one."""

from __future__ import annotations

import asyncio
import json
import ssl
from dataclasses import replace
from pathlib import Path

import pytest
from support.small_server import small_server

from server.bench.scenarios import SCENARIOS
from server.bench.wire.client import BaseUrl
from server.commands.bench import BenchOptions, bench, running_target, tls_reason
from server.config.errors import ConfigError
from server.config.settings import Settings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give the URL of a running server, or, to start and compare servers on this machine, run ./scripts/bench"),
        ({"url": "http://x", "scenario": "R8"}, "'R8' is unknown; for a running server there are throughput, R2"),
        ({"url": "http://x", "scenario": "R7"}, "./scripts/bench in a checkout has those that measure this machine"),
        ({"url": "http://x", "seed": -1}, "--seed is -1"),
    ],
)
def test_options_that_cannot_be_served(options: dict[str, str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        bench(BenchOptions(**options), Settings(data_dir=tmp_path, cache_dir=tmp_path))  # type: ignore[arg-type]
    assert words in str(raised.value)


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
    target = await running_target(BenchOptions(url=url, api_key=given), url, "own")
    assert seen == [sent]
    assert target.api_key == sent


async def test_a_server_without_tls() -> None:
    async def handle(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as listening:
        url = f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"no TLS with https://127.*does it speak http:// instead\?"):
            await running_target(BenchOptions(url=url), url)


def test_a_certificate_that_is_not_accepted() -> None:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = "self-signed certificate"
    assert tls_reason(error) == "its certificate is not accepted: self-signed certificate"


async def test_a_server_that_lists_no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(200, b'{"models": []}'), (200, b"words"), (403, b'{"models": [{"name": "models/m"}]}')]

    async def answer(*_: object) -> tuple[int, bytes]:
        return answers.pop()

    monkeypatch.setattr("server.commands.bench.get", answer)
    url = "http://127.0.0.1:9"
    for status in (403, 200, 200):
        with pytest.raises(ConfigError, match=rf"127.0.0.1:9 lists no models, but answers HTTP {status}: .*--model"):
            await running_target(BenchOptions(url=url), url)
    assert not answers


def run(url: str, folder: Path) -> None:
    options = BenchOptions(
        url=url, streams=[1, 2], requests=1, rounds=2, tokens=4, seconds=0, output=folder / "results"
    )
    bench(options, Settings(data_dir=folder, cache_dir=folder))


def test_a_server_that_somebody_else_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_server(tmp_path / "log") as url:
        run(url, tmp_path)
    (path,) = (tmp_path / "results").glob("*.json")
    content = json.loads(path.read_text())
    assert content["incomplete"] == ""
    assert [m["round"] for m in content["measurements"]] == [0, 0, 1, 1]
    assert path.with_suffix(".png").is_file()
    told = capsys.readouterr()
    assert "Medians over the rounds" in told.out
    assert "round 2, server, 2 streams" in told.err


def test_a_run_that_fails_keeps_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        small_server(tmp_path / "log", limit=3 + 32 + 3) as url,
        pytest.raises(ConfigError, match=r"server failed every request of the load '1 stream': HTTP 500: worn out"),
    ):
        run(url, tmp_path)
    (path,) = (tmp_path / "results").glob("*.json")
    content = json.loads(path.read_text())
    assert "worn out" in content["incomplete"]
    assert [m["load"] for m in content["measurements"]] == ["1 stream", "2 streams"]
    assert "the measurements until then" in capsys.readouterr().err


def test_a_run_keeps_what_it_measured_whatever_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setitem(SCENARIOS, "throughput", replace(SCENARIOS["throughput"], find=broken))
    with (
        small_server(tmp_path / "log") as url,
        pytest.raises(RuntimeError, match="a mistake of ours"),
    ):
        run(url, tmp_path)
    (path,) = (tmp_path / "results").glob("*.json")
    content = json.loads(path.read_text())
    assert "a mistake of ours" in content["incomplete"]
    assert len(content["measurements"]) == 4


def test_results_that_cannot_be_written_are_known_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")
    with pytest.raises(ConfigError, match="results cannot be created: File exists; name another: --output"):
        run("http://127.0.0.1:9", tmp_path)
