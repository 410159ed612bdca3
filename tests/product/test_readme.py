"""What the README tells a new user to type, typed."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from support.sdks import JS_SDK, environment, node, sdk_python
from support.server import RunningServer

README = (Path(__file__).parents[2] / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8080"

pytestmark = pytest.mark.product


def snippet(language: str, castor: RunningServer) -> str:
    """The first code block of a language, against this server."""
    code = snippet_of(language)
    assert ADDRESS in code
    return code.replace(ADDRESS, castor.url)


def snippet_of(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found[1]


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


def test_every_example_of_code_limits_its_answer() -> None:
    assert "max_output_tokens" in snippet_of("python")
    assert "maxOutputTokens" in snippet_of("js")


def test_the_settings_for_gemini_cli_name_the_login_that_works() -> None:
    """As in test_other_clients.py."""
    found = re.search(r'^(\{"security": .*)$', README, re.MULTILINE)
    assert found is not None
    assert json.loads(found[1]) == {"security": {"auth": {"selectedType": "gemini-api-key"}}}


def test_the_js_snippet_runs(castor: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(environment(JS_SDK.name, "node_modules"))
    script = tmp_path / "snippet.mjs"
    script.write_text(snippet("js", castor))
    done = subprocess.run([node(), script], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
