"""What the README tells a new user to type, typed."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.sdks import JS_SDK, environment, node, sdk_python
from support.server import RunningServer, running_server

README = (Path(__file__).parents[2] / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8080"

pytestmark = pytest.mark.product


@pytest.fixture(scope="module")
def castor(builtin_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The snippets set no limit; on two shared cores a story of 2,048 tokens takes minutes."""
    folder = tmp_path_factory.mktemp("readme")
    entry = {"source": str(builtin_model), "aliases": ["gemini-*"], "max_output_tokens": 32}
    (folder / "models.yaml").write_text(yaml.safe_dump({"models": {"built-in": entry}}))
    with running_server(folder, "--models", str(folder / "models.yaml")) as server:
        yield server


def snippet(language: str, castor: RunningServer) -> str:
    """The first code block of a language, against this server."""
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    assert ADDRESS in found[1]
    return found[1].replace(ADDRESS, castor.url)


def test_the_first_curl_is_answered(castor: RunningServer) -> None:
    found = re.search(r"    (curl http.*?'\n)", README, re.DOTALL)
    assert found is not None
    done = subprocess.run(
        ["bash", "-c", found[1].replace(ADDRESS, castor.url)], capture_output=True, text=True, timeout=120, check=True
    )
    shown = re.search(r"```json\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    assert json.loads(done.stdout)["candidates"] == json.loads(shown[1])["candidates"]


def test_the_lines_about_files_run_one_after_the_other(castor: RunningServer, tmp_path: Path) -> None:
    script = "set -e\n" + snippet("sh", castor).replace("curl -s", "echo; curl -sS --fail-with-body")
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    uploaded, answer, download, deleted = (line for line in done.stdout.splitlines() if line)
    file = json.loads(uploaded)["file"]
    assert (file["name"], file["displayName"], file["mimeType"]) == ("files/notes", "notes.txt", "text/plain")
    assert "Rufus" in json.loads(answer)["candidates"][0]["content"]["parts"][0]["text"]
    assert download == (tmp_path / "notes.txt").read_text().strip()
    assert json.loads(deleted) == {}


def test_the_python_snippet_runs(castor: RunningServer) -> None:
    done = subprocess.run(
        [sdk_python("3.6.1"), "-c", snippet("python", castor)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_js_snippet_runs(castor: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(environment(JS_SDK.name, "node_modules"))
    script = tmp_path / "snippet.mjs"
    script.write_text(snippet("js", castor))
    done = subprocess.run([node(), script], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
