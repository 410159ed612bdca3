"""The official SDKs' own files.upload, get, list, download and delete, and documents in prompts, on a real server."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.pdfs import pdf
from support.sdks import CLIENTS, JS_SDK, check_report, environment, node, sdk_python
from support.server import RunningServer

pytestmark = pytest.mark.product

WORDS = "Anna keeps the lighthouse of Skagen. The name of her dog is Rufus. Rufus is nine years old."


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A PDF and a text file that say the same."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "lighthouse.pdf").write_bytes(pdf(*WORDS.split(". ")))
    (folder / "lighthouse.txt").write_text(WORDS)
    return folder / "lighthouse.pdf", folder / "lighthouse.txt"


@pytest.mark.parametrize(("version", "prefix"), [("3.6.1", ""), ("2.34.0", "/genai"), ("1.60.0", "")])
def test_the_python_sdk(version: str, prefix: str, castor: RunningServer, documents: tuple[Path, Path]) -> None:
    check_report([sdk_python(version), CLIENTS / "genai_files.py", castor.url + prefix, *documents], 5, version)


@pytest.mark.parametrize("prefix", ["", "/genai"])
def test_the_javascript_sdk(prefix: str, castor: RunningServer, documents: tuple[Path, Path]) -> None:
    environment(JS_SDK.name, "node_modules")
    check_report([node(), CLIENTS / "genai_files.mjs", JS_SDK, castor.url + prefix, documents[1]], 5, "3.1.0")


def test_curl_sends_an_empty_file_in_every_form(castor: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    forms = (
        ["-F", 'metadata={"file": {"displayName": "nothing"}}', "-F", f"file=@{tmp_path}/empty.txt"],
        [
            "-H",
            "X-Goog-Upload-Protocol: raw",
            "-H",
            "Content-Type: text/plain",
            "--data-binary",
            f"@{tmp_path}/empty.txt",
        ],
    )
    for form in forms:
        command = ["curl", "-sS", "--fail-with-body", "-X", "POST", f"{castor.url}/upload/v1beta/files", *form]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout
        assert '"sizeBytes":"0"' in done.stdout
        assert '"mimeType":"text/plain"' in done.stdout
