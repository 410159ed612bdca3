"""Clients that other people wrote for the Gemini API, at pinned versions, each in an environment of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.sdks import CLIENTS, check_report, environment, java, node
from support.server import RunningServer, running_server
from support.tiny import endless_model_folder

LANGCHAIN = "langchain-google-genai-4.4.2"
LEGACY = "google-generativeai-0.8.6"
AI_SDK = "ai-sdk-google-4.0.121"
GENKIT = "genkit-1.42.0"
OLD_JS_SDK = "generative-ai-js-0.24.1"
AGENTS = "agents-1"
GEMINI_CLI = "gemini-cli-0.61.0"
JAVA = json.loads((Path(__file__).parents[1] / "data" / "java_requests.json").read_text())

pytestmark = pytest.mark.product


def test_the_ai_sdk(restless: RunningServer) -> None:
    folder = str(Path(environment(AI_SDK, "node_modules/@ai-sdk/google")).parents[2])
    check_report([node(), CLIENTS / "ai_sdk_client.mjs", folder, restless.url], 10, "4.0.121")


def test_genkit(restless: RunningServer) -> None:
    folder = Path(environment(GENKIT, "node_modules")).parent
    check_report([node(), CLIENTS / "genkit_client.mjs", folder, restless.url], 7, "1.42.0")


def test_the_old_javascript_sdk(restless: RunningServer) -> None:
    folder = Path(environment(OLD_JS_SDK, "node_modules")).parent
    check_report([node(), CLIENTS / "generative_ai_client.mjs", folder, restless.url], 9, "0.24.1")


def test_langchain(restless: RunningServer) -> None:
    python = environment(LANGCHAIN, "bin/python")
    check_report([python, CLIENTS / "langchain_client.py", restless.url], 7, "4.4.2")


def test_the_legacy_sdk_over_rest(restless: RunningServer) -> None:
    python = environment(LEGACY, "bin/python")
    check_report([python, CLIENTS / "legacy_client.py", restless.url], 10, "0.8.6")


@pytest.mark.parametrize(
    ("script", "checks", "version"),
    [
        ("litellm_client.py", 10, "1.110.2"),
        ("pydantic_ai_client.py", 11, "2.68.0"),
        ("instructor_client.py", 5, "1.17.0"),
        ("llm_gemini_client.py", 6, "0.35"),
    ],
)
def test_frameworks_of_agents(script: str, checks: int, version: str, restless: RunningServer) -> None:
    check_report([environment(AGENTS, "bin/python"), CLIENTS / script, restless.url], checks, version)


def test_the_jdks_http_client(restless: RunningServer) -> None:
    check_report([java(), CLIENTS / "JavaHttpClient.java", restless.url], 8)


@pytest.mark.parametrize("kind", sorted(JAVA["requests"]))
def test_the_bytes_of_the_jdks_http_client(kind: str, restless: RunningServer) -> None:
    """What it sends, offer of HTTP/2 included, on machines without Java too."""
    request = JAVA["requests"][kind]
    with socket.create_connection(("127.0.0.1", restless.port), timeout=120) as connection:
        connection.sendall("\r\n".join([*request["head"], "", ""]).encode())
        reading = connection.makefile("rb")
        if "Expect: 100-Continue" in request["head"]:
            assert reading.readline() == b"HTTP/1.1 100 Continue\r\n"
            assert reading.readline() == b"\r\n"
        connection.sendall(request["body"].encode())
        assert reading.readline() == b"HTTP/1.1 200 OK\r\n"


@pytest.fixture
def long_context(tmp_path: Path) -> Iterator[RunningServer]:
    """A tiny random model under every cloud model's name; its context holds the prompt of an agent, a token a byte."""
    model = endless_model_folder(tmp_path / "tiny", max_position_embeddings=32_768, num_hidden_layers=1)
    lenient = ["generationConfig.thinkingConfig.thinkingBudget", "generationConfig.thinkingConfig.thinkingLevel"]
    entry = {"source": str(model), "aliases": ["gemini-*"], "max_output_tokens": 24, "lenient": lenient}
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"models": {"tiny": entry}}))
    with running_server(tmp_path, "--models", str(tmp_path / "models.yaml")) as server:
        yield server


def run_gemini_cli(folder: Path, url: str, prompt: str) -> dict[str, Any]:
    """The answer to a non-interactive prompt, in an empty home and folder, with a short system prompt and one tool."""
    program = [node(), environment(GEMINI_CLI, "node_modules/@google/gemini-cli/bundle/gemini.js")]
    settings = {
        "security": {"auth": {"selectedType": "gemini-api-key"}},
        "tools": {"core": ["read_file"]},
        "privacy": {"usageStatisticsEnabled": False},
        "telemetry": {"enabled": False},
        "general": {"enableAutoUpdate": False},
    }
    home, work = folder / "home", folder / "work"
    (home / ".gemini").mkdir(parents=True)
    work.mkdir()
    (home / ".gemini" / "settings.json").write_text(json.dumps(settings))
    (folder / "system.md").write_text("You answer in one short sentence.")
    done = subprocess.run(
        [*program, "--prompt", prompt, "--model", "gemini-2.5-flash", "--output-format", "json"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        cwd=work,
        stdin=subprocess.DEVNULL,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "GEMINI_API_KEY": "any",
            "GOOGLE_GEMINI_BASE_URL": url,
            "GEMINI_SYSTEM_MD": str(folder / "system.md"),
            "GEMINI_CLI_TRUST_WORKSPACE": "true",
        },
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout[done.stdout.index("{") :])


def test_gemini_cli_gets_an_answer(tmp_path: Path, long_context: RunningServer) -> None:
    answer = run_gemini_cli(tmp_path / "cli", long_context.url, "What is the capital of France?")
    assert answer["response"]
    usage = answer["stats"]["models"]["tiny"]
    assert (usage["api"]["totalRequests"], usage["api"]["totalErrors"]) == (1, 0)
    (request,) = [entry for entry in long_context.request_log() if entry.get("method") == "streamGenerateContent"]
    assert request["status"] == 200
    assert request["ignored"] == ["generationConfig.thinkingConfig.thinkingBudget"]
    assert usage["tokens"]["prompt"] == request["prompt_tokens"] > 500
