"""The wheel: what is in it, and that it serves where nothing else is installed."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys
import time
import tomllib
import venv
import zipfile
from pathlib import Path

import httpx
import pytest
from support.server import free_port

from engine.native.compiled.shipped import INSTRUCTION_SETS

ROOT = Path(__file__).parents[2]
# Compiling takes a while: one worker does it for all of these tests.
pytestmark = pytest.mark.xdist_group("wheel")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(place), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    return next(place.glob("*.whl"))


def test_it_holds_the_packages_and_the_builtin_models(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        models = archive.read("server/models.yaml")
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert models == (ROOT / "models.yaml").read_bytes()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"server", "engine"}
    sources = [path for package in ("server", "engine") for path in (ROOT / package).rglob("*.*")]
    code = {str(path.relative_to(ROOT)) for path in sources if path.suffix in (".py", ".c", ".h")}
    assert "engine/native/forward.c" in code
    assert code <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "castor = server.cli:main" in entry_points


def test_its_name_and_version_are_those_of_the_project(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert wheel.name.startswith(f"castor_serve-{project['version']}-py3-none-")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a wheel is for any machine")
def test_it_holds_compiled_code_for_this_platform_alone(wheel: Path) -> None:
    machine = platform.machine()
    assert re.search(rf"-py3-none-manylinux_2_\d+_{machine}\.whl$", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if name.endswith(".so")}
    assert found == {f"engine/native/compiled/{one.file_name}" for one in INSTRUCTION_SETS[machine]}


def test_its_commands_can_be_imported_without_a_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    commands = ["server.commands." + path.stem for path in (tmp_path / "server" / "commands").glob("[a-z]*.py")]
    # None stands for a module that cannot be found, although this environment may have the checkout on its path.
    code = f"import sys; sys.modules['benchmarks'] = None; import {', '.join(commands)}; print(server.__file__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "server" / "__init__.py")


@pytest.mark.product
@pytest.mark.timeout(900)
def test_it_installs_into_an_empty_environment_and_serves(wheel: Path, builtin_model: Path, tmp_path: Path) -> None:
    """With its own code, as there is no compiler; that the model is computed with it is proved at each load."""
    environment = tmp_path / "env"
    venv.create(environment, with_pip=True)
    install_pinned(environment / "bin" / "python", wheel)
    port = free_port()
    command = [environment / "bin" / "castor", "serve", "--port", str(port), "--data-dir", tmp_path / "data"]
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CC")}
    outside["PATH"] = str(environment / "bin")
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=outside, stdout=log, stderr=log)
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/readyz", server, tmp_path / "log")
            answer = httpx.post(
                f"http://127.0.0.1:{port}/v1beta/models/gemini-2.5-flash:generateContent",
                json={
                    "contents": [{"parts": [{"text": "What is the capital of France?"}]}],
                    "generationConfig": {"temperature": 0},
                },
                timeout=120,
            )
        finally:
            server.terminate()
            server.wait(timeout=60)
    assert "Paris" in answer.json()["candidates"][0]["content"]["parts"][0]["text"]
    said = (tmp_path / "log").read_text()
    assert "The native code is the wheel's, forward-" in said
    assert "Computed by torch" not in said


def install_pinned(python: Path, wheel: Path) -> None:
    """As scripts/serve does it: torch first, alone and from its own index; the pins then keep it in place."""
    index = os.environ.get("CASTOR_TORCH_INDEX")
    constraints = ROOT / "constraints.txt"
    torch = next(line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *([f"--index-url={index}"] if index else []), torch], check=True, timeout=600)
    subprocess.run([*pip, "-c", str(constraints), str(wheel)], check=True, timeout=600)


def wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=10).status_code == 200:
                return
        time.sleep(0.2)
    raise TimeoutError(log.read_text())
