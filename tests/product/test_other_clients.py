"""Clients that other people wrote for the Gemini API, at pinned versions, each in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from support.sdks import CLIENTS, check_report, environment, node
from support.server import RunningServer, running_server
from support.tiny import EOS_ID, tiny_model_folder

LANGCHAIN = "langchain-google-genai-4.4.2"
LEGACY = "google-generativeai-0.8.6"
AI_SDK = "ai-sdk-google-4.0.121"
GEMINI_CLI = "gemini-cli-0.61.0"

pytestmark = pytest.mark.product


def test_the_ai_sdk(castor: RunningServer) -> None:
    folder = str(Path(environment(AI_SDK, "node_modules/@ai-sdk/google")).parents[2])
    check_report([node(), CLIENTS / "ai_sdk_client.mjs", folder, castor.url], 7, "4.0.121")


def test_langchain(castor: RunningServer) -> None:
    python = environment(LANGCHAIN, "bin/python")
    check_report([python, CLIENTS / "langchain_client.py", castor.url], 5, "4.4.2")


def test_the_legacy_sdk_over_rest(castor: RunningServer) -> None:
    python = environment(LEGACY, "bin/python")
    check_report([python, CLIENTS / "legacy_client.py", castor.url], 9, "0.8.6")


def keep_from_ending(model: Path) -> None:
    """Give the end token the logit 0, which never is among the 64 of 320 that are drawn from: no answer is empty."""
    path = model / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"][EOS_ID] = 0
    save_file(weights, path, {"format": "pt"})


@pytest.fixture
def long_context(tmp_path: Path) -> Iterator[RunningServer]:
    """A tiny random model under every cloud model's name; its context holds the prompt of an agent, a token a byte."""
    model = tiny_model_folder(tmp_path / "tiny", max_position_embeddings=32768, num_hidden_layers=1)
    keep_from_ending(model)
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
