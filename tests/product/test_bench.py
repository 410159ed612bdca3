"""`castor bench` against a real server: its numbers are the server's own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.server import RunningServer

pytestmark = pytest.mark.product

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"
COUNTERS = ("castor_requests_total", "castor_generated_tokens_total", "castor_prompt_tokens_total")
WARM_UP, WARM_UP_TOKENS = 1 + 3, 4


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CASTOR_")}
    command = [sys.executable, "-m", "server.cli", "bench", *args]
    environment = clean | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)


def counters(server: RunningServer) -> list[float]:
    return [server.metric(name, model=MODEL) for name in COUNTERS]


def test_the_numbers_are_those_of_the_server(castor: RunningServer, tmp_path: Path) -> None:
    before = counters(castor)
    sizes = ["--streams", "1", "--streams", "3", "--tokens", "12", "--requests", "2", "--rounds", "1", "--rate", "8"]
    done = bench(castor.url, *sizes, "--seconds", "0", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    requests, generated, prompts = (after - was for after, was in zip(counters(castor), before, strict=True))
    (path,) = tmp_path.glob("*-throughput.json")
    measurements = json.loads(path.read_text())["measurements"]
    assert [m["load"] for m in measurements] == ["1 stream", "3 streams", "8 a second"]
    outcomes = [outcome for m in measurements for outcome in m["requests"]]
    assert all(outcome["error"] is None and outcome["counted_by"] == "usage" for outcome in outcomes)
    assert len(outcomes) + WARM_UP == requests
    assert sum(outcome["prompt_tokens"] for outcome in outcomes) < prompts
    counted = sum(outcome["output_tokens"] for outcome in outcomes)
    assert counted <= generated <= counted + WARM_UP * WARM_UP_TOKENS
    # Every token after the first arrived at some instant.
    for outcome in outcomes:
        assert sum(tokens for _, tokens in outcome["gaps"]) <= outcome["output_tokens"] - 1
        assert outcome["ended"] >= outcome["first"] > outcome["sent"] >= outcome["intended"]
    assert "tok/s" in done.stdout
    assert "castor" not in done.stderr.splitlines()[-1]


def test_requests_that_are_left_give_everything_back(castor: RunningServer, tmp_path: Path) -> None:
    sizes = ["--streams", "2", "--tokens", "16", "--requests", "1", "--rounds", "1", "--output", str(tmp_path)]
    done = bench(castor.url, "--scenario", "R6", "--seconds", "0", *sizes)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*-R6.json")
    findings = {finding["name"]: finding["value"] for finding in json.loads(path.read_text())["findings"]}
    assert findings["KV blocks held afterwards"]["most"] == 0


def test_a_url_that_nobody_answers_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as silent:  # it has its port and does not listen, nor can anybody else there
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert_refused_in_one_sentence(url, "start one: castor serve", tmp_path)


def test_a_url_without_a_scheme_is_one_sentence(tmp_path: Path) -> None:
    assert_refused_in_one_sentence("127.0.0.1:8080", "write it like http://127.0.0.1:8080", tmp_path)


def assert_refused_in_one_sentence(url: str, words: str, tmp_path: Path) -> None:
    done = bench(url, "--output", str(tmp_path))
    assert done.returncode == 1
    sentence = done.stderr.splitlines()[-1]
    assert sentence.startswith("castor: ")
    assert words in sentence
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_model_that_the_server_does_not_have(castor: RunningServer, tmp_path: Path) -> None:
    done = bench(castor.url, "--model", "none-such", "--output", str(tmp_path))
    assert done.returncode == 1
    assert "HTTP 404" in done.stderr
    assert "none-such" in done.stderr
