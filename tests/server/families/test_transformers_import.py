"""transformers in the server's process: imported once, whole and without torch, and refused where it is too old."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.fakes import tokenizer_folder

from server.config.errors import ConfigError
from server.families.transformers_import import OLDEST, require_library

ROOT = Path(__file__).parents[3]
THREADS = 8


def run(program: str, *options: str) -> str:
    """What a fresh interpreter prints that runs this."""
    command = [sys.executable, *options, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def install(folder: Path, version: str) -> Path:
    """A folder for the import path in which transformers seems to be installed, as far as metadata tell."""
    metadata = folder / f"transformers-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n")
    return folder


def test_threads_that_need_it_at_the_same_moment_all_get_it() -> None:
    said = run(f"""
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from server.families.transformers_import import library
together = Barrier({THREADS})
def ask(_):
    together.wait()
    return library()
with ThreadPoolExecutor({THREADS}) as threads:
    got = set(map(id, threads.map(ask, range({THREADS}))))
assert "torch" not in sys.modules
print(len(got))
""")
    assert said == "1\n"


def test_all_of_it_is_imported_at_once(tmp_path: Path) -> None:
    """What it imported later, in whatever thread needs it first, could meet another thread that imports the same."""
    said = run(f"""
import asyncio, sys
from pathlib import Path
from engine.api.events import FinishReason
from server.convert.chat_tokenizer import ChatTokenizer
from server.convert.rendering import TemplateInput
from server.families.table import FAMILIES
from server.families.transformers_import import library
from server.families.tool_call_reader import ToolCall
from server.mapper.parts import answer_parser
library()
before = set(sys.modules)
async def render():
    tokenizer = ChatTokenizer(Path({str(tokenizer_folder(tmp_path))!r}))
    for text in ("hi <|im_end|>", "bulky " * 20_000):
        await tokenizer.render(TemplateInput([{{"role": "user", "content": text}}]))
    await tokenizer.close()
asyncio.run(render())
tool = {{"type": "function", "function": {{"name": "f", "parameters": {{"type": "object", "properties": {{}}}}}}}}
hermes = next(family for family in FAMILIES if family.name == "hermes")
parser = answer_parser(hermes, [tool])()
pieces = parser.feed('<tool_call>{{"name": "f", "arguments": {{}}}}</tool_call>') + parser.flush(FinishReason.STOP)
assert any(isinstance(piece, ToolCall) for piece in pieces), pieces
print([name for name in set(sys.modules) - before if name.partition(".")[0] in ("transformers", "torch")])
""")
    assert said == "[]\n"


@pytest.mark.parametrize("version", ["4.57.1", "5", "5.3.0", "5.17.0", "5.22.9.post1"])
def test_an_older_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.syspath_prepend(install(tmp_path, version))
    with pytest.raises(ConfigError, match=f"transformers {version} is installed, .*>=5.23.*: run `.* install "):
        require_library()


@pytest.mark.parametrize("version", ["5.23.0", "5.23.0.dev0", "5.100.1", "6"])
def test_a_newer_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.syspath_prepend(install(tmp_path, version))
    require_library()


def test_a_missing_one_is_told() -> None:
    said = run("""
from server.families.transformers_import import require_library
from server.config.errors import ConfigError
try:
    require_library()
except ConfigError as error:
    print(error)
""", "-S")  # fmt: skip
    assert said.startswith("transformers is not installed, but the server needs transformers>=5.23")


def test_the_package_asks_for_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert f"transformers>={'.'.join(map(str, OLDEST))}" in project["dependencies"]
