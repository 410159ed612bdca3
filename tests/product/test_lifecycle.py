"""Starting, being asked while loading, overload, keys, draining: the server as its operator sees it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import yaml
from support.processes import is_alive
from support.server import RunningServer, running_server
from support.waiting import wait_until

pytestmark = pytest.mark.product

QUESTION = {"contents": [{"parts": [{"text": "Tell me a long story."}]}]}


def test_while_the_model_loads_health_is_200_and_readiness_503(builtin_model: Path, tmp_path: Path) -> None:
    server = RunningServer(tmp_path)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert time.monotonic() < deadline, server.log()
            try:
                ready = server.client.get("/readyz")
                break
            except httpx.TransportError:
                time.sleep(0.02)
        assert ready.status_code == 503
        assert "smollm2-135m-instruct" in ready.text
        assert server.client.get("/healthz").status_code == 200
        refused = server.generate(QUESTION)
        assert refused.status_code == 503
        assert refused.json()["error"]["status"] == "UNAVAILABLE"
        server.wait_until_ready()
    finally:
        assert server.stop() == 0


def test_sigterm_lets_a_running_answer_end(builtin_model: Path, tmp_path: Path) -> None:
    with running_server(tmp_path, "--drain-seconds", "120") as server, ThreadPoolExecutor(1) as pool:
        body = {**QUESTION, "generationConfig": {"maxOutputTokens": 200, "seed": 5}}
        answer = pool.submit(server.generate, body)
        wait_until(lambda: answer.done() or server.metric("castor_sequences_running"))
        server.process.send_signal(signal.SIGTERM)
        assert not answer.done(), "it ended before the signal, which therefore tells nothing"
        assert answer.result(timeout=60).json()["candidates"][0]["finishReason"] in ("STOP", "MAX_TOKENS")
        assert server.process.wait(timeout=30) == 0


def test_a_drain_that_takes_too_long_ends_streams_with_an_error(builtin_model: Path, tmp_path: Path) -> None:
    with running_server(tmp_path, "--drain-seconds", "1") as server:
        body = {**QUESTION, "generationConfig": {"maxOutputTokens": 2000, "seed": 5}}
        path = f"{server.url}/v1beta/models/smollm2-135m-instruct:streamGenerateContent?alt=sse"
        with httpx.stream("POST", path, json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
        assert "error" in events[-1] or "finishReason" in events[-1]["candidates"][0]
        assert server.process.wait(timeout=30) == 0


def test_a_full_queue_is_429_at_once(builtin_model: Path, tmp_path: Path) -> None:
    entry = {"source": str(builtin_model), "max_running": 1, "max_waiting": 1}
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"models": {"tight": entry}}))
    with running_server(tmp_path, "--models", str(tmp_path / "models.yaml")) as server:
        body = {**QUESTION, "generationConfig": {"maxOutputTokens": 20, "seed": 5}}
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: server.generate(body, model="tight"), range(8)))
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses.count(200) >= 2
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) == len(answers) - statuses.count(200) > 0
        error = refused[0].json()["error"]
        assert error["status"] == "RESOURCE_EXHAUSTED"
        assert any(detail["@type"].endswith("google.rpc.RetryInfo") for detail in error["details"])
        assert server.metric("castor_rejected_total") == len(refused)


def test_keys_are_asked_for_where_they_are_set(builtin_model: Path, tmp_path: Path) -> None:
    body = {**QUESTION, "generationConfig": {"maxOutputTokens": 2}}
    path = "/v1beta/models/gemini-2.5-flash:generateContent"
    with running_server(tmp_path, environment={"CASTOR_API_KEYS": "alpha,beta"}) as server:
        ask = server.client.post
        assert ask(path, json=body).status_code == 403
        wrong = ask(path, json=body, headers={"x-goog-api-key": "gamma"})
        assert wrong.status_code == 400
        assert "API key not valid" in wrong.json()["error"]["message"]
        assert ask(path, json=body, headers={"x-goog-api-key": "alpha"}).status_code == 200
        assert ask(path, json=body, headers={"Authorization": "Bearer beta"}).status_code == 200
        assert ask(path + "?key=alpha", json=body).status_code == 200
        assert "alpha" not in server.log()


def test_a_port_in_use_is_one_sentence(builtin_model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "server.cli", "serve", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(
            [*command, "--data-dir", str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "in use" in done.stderr


def test_a_folder_is_served_without_yaml(builtin_model: Path, tmp_path: Path) -> None:
    with running_server(tmp_path, str(builtin_model)) as server:
        (model,) = server.client.get("/v1beta/models").json()["models"]
        answer = server.client.post(
            f"/v1beta/{model['name']}:generateContent",
            json={**QUESTION, "generationConfig": {"maxOutputTokens": 3}},
        )
        assert answer.json()["candidates"][0]["finishReason"] == "MAX_TOKENS"


def generate_until_cut_off(server: RunningServer, body: dict[str, object]) -> None:
    with suppress(httpx.TransportError):
        server.generate(body)


def is_refused(server: RunningServer) -> bool:
    """Whether the server takes no new connections: it has begun to drain."""
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
    except OSError:
        return True
    return False


def test_two_interrupts_end_the_server_at_once(builtin_model: Path, tmp_path: Path) -> None:
    server = RunningServer(tmp_path, "--drain-seconds", "600")
    try:
        server.wait_until_ready()
        body = {**QUESTION, "generationConfig": {"maxOutputTokens": 2000, "seed": 1}}
        threading.Thread(target=generate_until_cut_off, args=(server, body), daemon=True).start()
        wait_until(lambda: server.metric("castor_sequences_running"))
        pids = server.engine_pids()
        assert pids
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: is_refused(server))
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=20) == 130
        wait_until(lambda: not any(map(is_alive, pids)))
    finally:
        server.stop()
