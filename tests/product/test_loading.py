"""A server whose model never comes to be loaded: it says so, and ends at once when it is told to."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx
import pytest
from support.fakes import tokenizer_folder
from support.processes import is_alive
from support.server import RunningServer
from support.waiting import wait_until

pytestmark = pytest.mark.product

# Each range may be no longer in the sandbox that templates run in.
ENDLESS = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4


def children(server: RunningServer) -> list[int]:
    pid = server.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def answers(server: RunningServer) -> bool:
    try:
        return server.client.get("/readyz").status_code == 503
    except httpx.TransportError:
        return False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    tokenizer_folder(made)
    return made


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("hanging", ["engine", "template"])
def test_a_signal_while_a_model_loads_ends_everything(
    hanging: str, end: signal.Signals, folder: Path, tmp_path: Path
) -> None:
    if hanging == "engine":
        (folder / "hangs").touch()
    else:
        (folder / "chat_template.jinja").write_text(ENDLESS)
    server = RunningServer(tmp_path, str(folder), program=("support.scripted_server",))
    try:
        wait_until(lambda: answers(server) and children(server))
        engines = children(server)
        server.process.send_signal(end)
        assert server.process.wait(timeout=60) == 0
        wait_until(lambda: not any(map(is_alive, engines)))
    finally:
        server.process.kill()
        server.stop()
