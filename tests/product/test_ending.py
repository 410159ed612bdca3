"""How the process ends when it is asked to, whatever its threads do."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.fakes import tokenizer_folder
from support.server import RunningServer

from server.http.serving import CLOSING_SECONDS, LAST_SECONDS

pytestmark = pytest.mark.product

SECONDS = 60.0


@pytest.fixture
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    how = request.param if request.param != "locked" else str(tmp_path / "now")
    folder = tokenizer_folder(tmp_path / "model")
    options = ("--drain-seconds", "1", str(folder))
    program = ("support.hanging_server",)
    running = RunningServer(tmp_path, *options, environment={"HANGING": how}, program=program)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.process.kill()
        running.stop()


def until_it_refuses(server: RunningServer) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            httpx.get(server.url + "/healthz")
        except httpx.TransportError:
            return
        time.sleep(0.02)
    raise TimeoutError("it still listens")


@pytest.mark.parametrize("server", ["sleeping", "spinning"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(server: RunningServer, number: signal.Signals) -> None:
    server.process.send_signal(number)
    assert server.process.wait(SECONDS) == 0


@pytest.mark.parametrize("server", ["locked"], indirect=True)
def test_it_ends_where_nothing_of_python_runs_any_more(server: RunningServer, tmp_path: Path) -> None:
    server.process.send_signal(signal.SIGTERM)
    until_it_refuses(server)
    (tmp_path / "now").touch()
    server.process.wait(SECONDS + CLOSING_SECONDS + LAST_SECONDS)
