"""Servers of a benchmark as processes, with small programs in their place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from server.bench import contenders
from server.bench.contenders import Contender, Sizes, started
from server.bench.protocols import Gemini
from server.settings import ConfigError

SIZES = Sizes(4, 256, 1)


def running(*code: str) -> Contender:
    """A program of Python; its first argument is the port."""

    def command(port: int, _sizes: Sizes) -> list[str]:
        return [sys.executable, "-c", "\n".join(code), str(port)]

    return Contender("program", Gemini(), "m", "/", command, Path(), Path(sys.executable), ())


def test_a_server_lives_as_long_as_the_block() -> None:
    ready = running(
        "import http.server, os, sys",
        "assert not any(name.startswith('CASTOR_API') for name in os.environ)",
        "os.chdir('/usr')",
        "http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind='127.0.0.1')",
    )
    with started(ready, SIZES) as target:
        assert target.pid is not None
        place = Path(f"/proc/{target.pid}")
        assert target.url.port > 0
    assert not place.exists()


def test_a_server_that_ends_at_once_is_told_with_its_last_words() -> None:
    with (
        pytest.raises(ConfigError, match=r"program ended with status 3 before it was ready: no weights \| twice"),
        started(running("import sys; print('no weights'); print('twice'); sys.exit(3)"), SIZES),
    ):
        pytest.fail("it was never ready")


def test_a_server_that_never_answers_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "START_SECONDS", 0.5)
    with (
        pytest.raises(ConfigError, match="was not ready within 0 s: it said nothing"),
        started(running("import time; time.sleep(60)"), SIZES),
    ):
        pytest.fail("it was never ready")
