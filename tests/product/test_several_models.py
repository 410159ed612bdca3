"""Three models that load together. Each start is a fresh process: what could go wrong happens while it imports."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import httpx
import pytest
import yaml
from support.fakes import tokenizer_folder
from support.server import START_SECONDS, RunningServer
from support.tiny import tiny_model_folder

pytestmark = pytest.mark.product

NAMES = ("one", "two", "three")
QUESTION = {"contents": [{"parts": [{"text": "hi"}]}], "generationConfig": {"maxOutputTokens": 3}}
REAL = ("server.cli",)
SCRIPTED = ("support.scripted_server",)

Program = tuple[str, ...]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Program, list[Path]]:
    """Three models with weights, and three as far as the front end reads them."""
    made = tmp_path_factory.mktemp("models")
    return {
        REAL: [tiny_model_folder(made / name, num_hidden_layers=layers) for layers, name in enumerate(NAMES, 1)],
        SCRIPTED: [tokenizer_folder(made / f"scripted-{name}") for name in NAMES],
    }


def start(program: Program, folders: dict[Program, list[Path]], load: str, place: Path) -> RunningServer:
    models = {name: {"source": str(folder), "load": load} for name, folder in zip(NAMES, folders[program], strict=True)}
    (place / "models.yaml").write_text(yaml.safe_dump({"models": models}))
    return RunningServer(place, "--models", str(place / "models.yaml"), program=program)


def asked_until_served(server: RunningServer, name: str) -> list[httpx.Response]:
    """What a client hears that begins before the server listens, and asks again when it is told to."""
    deadline = time.monotonic() + START_SECONDS
    heard: list[httpx.Response] = []
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            heard.append(server.generate(QUESTION, model=name))
        except httpx.ConnectError:
            time.sleep(0.1)
            continue
        if heard[-1].status_code != 503:
            break
        time.sleep(float(heard[-1].headers["retry-after"]))
    return heard


def states(server: RunningServer) -> dict[str, str]:
    return {name: told["state"] for name, told in server.client.get("/readyz").json()["models"].items()}


@pytest.mark.parametrize("program", [REAL, *[SCRIPTED] * 4])
def test_all_are_ready(program: Program, folders: dict[Program, list[Path]], tmp_path: Path) -> None:
    server = start(program, folders, "start", tmp_path)
    try:
        server.wait_until_ready()
        assert states(server) == dict.fromkeys(NAMES, "ready")
        assert [server.generate(QUESTION, model=name).status_code for name in NAMES] == [200] * 3
    finally:
        server.stop()


@pytest.mark.parametrize("load", ["start", "request"])
@pytest.mark.parametrize("program", [REAL, *[SCRIPTED] * 2])
def test_all_answer_those_who_ask_too_early(
    program: Program, load: str, folders: dict[Program, list[Path]], tmp_path: Path
) -> None:
    server = start(program, folders, load, tmp_path)
    try:
        with ThreadPoolExecutor(16) as clients:
            stories = list(clients.map(partial(asked_until_served, server), islice(cycle(NAMES), 16)))
        assert [heard[-1].status_code for heard in stories] == [200] * 16, server.log()
        early = [answer for heard in stories for answer in heard[:-1]]
        assert {answer.json()["error"]["status"] for answer in early} == {"UNAVAILABLE"}
        assert states(server) == dict.fromkeys(NAMES, "ready")
    finally:
        server.stop()
