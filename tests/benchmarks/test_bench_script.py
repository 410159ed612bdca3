"""scripts/bench with programs in the place of Castor and Python that print what they were called with."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HARNESS = "-P -m benchmarks.harness"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in which everything counts as installed."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root)
    for name in ("castor", "python"):
        command = root / ".venv" / "bin" / name
        command.parent.mkdir(parents=True, exist_ok=True)
        command.write_text('#!/bin/sh\necho "$PWD:" "$@"\n')
        command.chmod(0o755)
    stamp = 'source "$1/scripts/environment.sh"; fingerprint >"$venv/.installed[bench]"'
    subprocess.run(["bash", "-c", stamp, "stamp", str(root)], check=True, timeout=60)
    return root


def calls(checkout: Path, *args: str, path: str | None = None) -> list[str]:
    """What the programs were called with, from another folder."""
    other = checkout.parent / "other"
    other.mkdir(exist_ok=True)
    environment = os.environ | ({"PATH": path} if path else {})
    command = [shutil.which("bash") or "bash", str(checkout / "scripts" / "bench"), *args]
    done = subprocess.run(command, cwd=other, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return [line.replace(f"{other}: ", "") for line in (done.stdout + done.stderr).splitlines()]


def test_paths_are_those_of_the_folder_that_it_is_called_from(checkout: Path) -> None:
    output = f"--output {checkout}/benchmarks"
    assert calls(checkout, "--models", "my.yaml", "--rounds", "1") == [
        "models fetch --models=my.yaml",
        f"{HARNESS} {output} --models my.yaml --rounds 1",
    ]
    assert calls(checkout, "--cache-dir=c", "--output", "here") == [
        "models fetch --cache-dir=c",
        f"{HARNESS} --cache-dir=c --output here",
    ]


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:8080"])
def test_nothing_is_fetched_for_a_url(checkout: Path, url: str) -> None:
    assert calls(checkout, "--rounds", "1", url) == [f"bench --output {checkout}/benchmarks --rounds 1 {url}"]


def test_peers_are_not_for_a_running_server(checkout: Path) -> None:
    for args in (("--peer", "llama.cpp", "http://x"), ("http://x", "--peer=none-such")):
        (sentence,) = calls(checkout, *args)
        assert sentence.endswith("leave out either the URL or --peer")


def test_help_fetches_nothing(checkout: Path) -> None:
    assert calls(checkout, "--help") == [f"{HARNESS} --help"]


def test_what_compiling_llama_cpp_needs_is_said_at_once(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("dirname", "grep", "cksum", "cat", "uname"):
        (tools / name).symlink_to(shutil.which(name) or name)
    assert calls(checkout, "--peer", "llama.cpp-native", path=str(tools)) == [
        "castor: the peer llama.cpp-native is compiled here, which needs cmake; on Debian install cmake and g++"
    ]


def test_llama_cpp_is_compiled_once(checkout: Path, tmp_path: Path) -> None:
    log, tools = tmp_path / "log", tmp_path / "tools"
    tools.mkdir()
    pip = f'#!/bin/sh\necho "$CMAKE_ARGS" "$@" >>"{log}"\n'
    venv = f'#!/bin/sh\n[ "$1" = -c ] && exit\nmkdir -p "$4/bin"\ncp "{tools}/pip" "$4/bin/python"\n'
    for name, code in (("python3", venv), ("pip", pip), *((tool, "#!/bin/sh\n") for tool in ("cmake", "c++", "make"))):
        (tools / name).write_text(code)
        (tools / name).chmod(0o755)
    for _ in range(2):
        calls(checkout, "--peer=llama.cpp-native", path=f"{tools}:{os.environ['PATH']}")
    (compiled,) = log.read_text().splitlines()
    assert compiled.startswith("-DLLAMA_LLGUIDANCE=OFF ")
    assert "--no-cache-dir --no-binary xllamacpp xllamacpp==" in compiled
    (checkout / ".bench-envs" / "llama.cpp-native" / ".done").write_text("another processor")
    calls(checkout, "--peer", "llama.cpp-native", path=f"{tools}:{os.environ['PATH']}")
    assert len(log.read_text().splitlines()) == 2
