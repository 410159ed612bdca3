"""Servers of a benchmark as processes, with small programs in their place."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import contenders
from benchmarks.harness.contenders import Contender, Sizes, castor, gguf_file, peer, started, versions
from benchmarks.harness.machine import Choice
from server.bench.wire.client import BaseUrl
from server.bench.wire.protocols import Gemini
from server.config.errors import ConfigError
from server.config.models_file import ModelSpec
from server.config.settings import Settings

SIZES = Sizes(4, 256, 1)
CPU = Choice("cpu", 2)


def running(*code: str) -> Contender:
    """A program of Python; its first argument is the port."""

    def command(port: int, _sizes: Sizes) -> list[str]:
        return [sys.executable, "-c", "\n".join(code), str(port)]

    return Contender("program", Gemini(), "m", "/", command, Path(), Path(sys.executable), ())


def test_a_server_lives_as_long_as_the_block() -> None:
    ready = running(
        "import http.server, os, sys",
        "assert not any(name.startswith('CASTOR_API') for name in os.environ)",
        "os.chdir('/usr')",
        "http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind='127.0.0.1')",
    )
    with started(ready, SIZES) as target:
        assert target.pid is not None
        place = Path(f"/proc/{target.pid}")
        assert target.url.port > 0
    assert not place.exists()


def test_a_server_that_ends_at_once_is_told_with_its_last_words() -> None:
    with (
        pytest.raises(ConfigError, match=r"program ended with status 3 before it was ready: no weights \| twice"),
        started(running("import sys; print('no weights'); print('twice'); sys.exit(3)"), SIZES),
    ):
        pytest.fail("it was never ready")


def test_who_answers_for_a_server_that_has_ended_is_not_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def somebody_answers(*_: object) -> bool:
        return True

    monkeypatch.setattr(contenders, "_is_ready", somebody_answers)
    (tmp_path / "log").write_text("the port is in use")
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait(30)
        with pytest.raises(ConfigError, match="ended with status 0 before it was ready: the port is in use"):
            contenders._wait_until_ready(running(), process, BaseUrl("http", "127.0.0.1", 9, ""), tmp_path / "log")


def test_another_port_where_somebody_has_taken_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [taken.getsockname()[1], contenders._free_port()]
        monkeypatch.setattr(contenders, "_free_port", lambda: ports.pop(0))
        server = running(
            "import http.server, sys",
            "http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind='127.0.0.1')",
        )
        with started(server, SIZES) as target:
            assert target.url.port != taken.getsockname()[1]
    assert not ports


def test_ports_are_none_that_systems_give_to_clients() -> None:
    port = contenders._free_port()
    assert port in contenders.PORTS
    with socket.create_server(("127.0.0.1", port)):
        assert not contenders._is_free(port)


def test_a_second_interruption_leaves_no_server_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()

    def interrupted(_seconds: float) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        contenders._end(process)
    monkeypatch.undo()
    assert process.wait(30) == -signal.SIGKILL
    process.stdout.close()


def test_a_server_that_never_answers_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "START_SECONDS", 0.5)
    with (
        pytest.raises(ConfigError, match="was not ready within 0 s: its log is empty"),
        started(running("import time; time.sleep(60)"), SIZES),
    ):
        pytest.fail("it was never ready")


def test_contenders(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    settings = Settings(data_dir=tmp_path, cache_dir=tmp_path)
    folder = ModelSpec("m", str(tmp_path))
    ours = castor(folder, settings, tmp_path / "models.yaml")
    assert {"--host", "127.0.0.1", "--models"} <= set(ours.command(1, None))  # type: ignore[arg-type]
    assert ours.weights == tmp_path
    assert versions(ours.python, ("starlette", "no-such-package")).keys() == {"python", "starlette"}
    with pytest.raises(ConfigError, match=r"needs a GGUF file, but the source of m is .*leave this peer out"):
        gguf_file(folder, settings)
    assert gguf_file(ModelSpec("m", "/some/m.gguf"), settings) == Path("/some/m.gguf")
    with pytest.raises(ConfigError, match=r"'vllm' is unknown; there are llama\.cpp, llama\.cpp-native, transformers"):
        peer("vllm", folder, settings, CPU)


def test_a_peer_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness.contenders.ENVIRONMENTS", tmp_path)
    settings = Settings(data_dir=tmp_path, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"run: \./scripts/bench --peer llama\.cpp"):
        peer("llama.cpp", ModelSpec("m", "/some/m.gguf"), settings, CPU)


def installed(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, says: str = "") -> None:
    """A peer whose Python says the same whatever it is asked."""
    python = folder / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho '{says}'\n")
    python.chmod(0o755)
    monkeypatch.setattr("benchmarks.harness.contenders.ENVIRONMENTS", folder)


def test_peers_compute_with_what_the_engine_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    installed(monkeypatch, tmp_path, "transformers")
    monkeypatch.chdir(tmp_path.parent)
    settings = Settings(data_dir=tmp_path, cache_dir=Path())

    def options(device: str, dtype: str = "auto") -> list[str]:
        spec = ModelSpec("m", tmp_path.name, dtype=dtype, base=Path())
        made = peer("transformers", spec, settings, Choice(device, 3))
        return made.command(1, Sizes(1, 1, 3))

    assert {"float32", "cpu", str(tmp_path)} <= set(options("cpu"))
    assert {"auto", "cuda:0"} <= set(options("cuda:0"))
    assert "bfloat16" in options("cpu", "bfloat16")


def test_what_llama_cpp_is_built_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, tmp_path, "llama.cpp", "CPU : AVX2 = 1 | FMA = 0 | ")
    installed(monkeypatch, tmp_path, "llama.cpp-native", "CUDA : ARCHS = 900 | CPU : AVX512 = 1 | ")
    monkeypatch.chdir(tmp_path)
    settings, spec = Settings(data_dir=tmp_path, cache_dir=Path()), ModelSpec("m", "m.gguf", base=Path())
    made = peer("llama.cpp", spec, settings, CPU)
    assert (made.build, made.weights) == ("CPU : AVX2 = 1 | FMA = 0 |", tmp_path / "m.gguf")
    with pytest.raises(
        ConfigError, match=r"on cuda:0, but this llama\.cpp is built for CPUs only: leave this peer out"
    ):
        peer("llama.cpp", spec, settings, Choice("cuda:0", 1))
    assert peer("llama.cpp-native", spec, settings, Choice("cuda:0", 1)).name == "llama.cpp-native"


def test_the_python_of_a_peer_that_is_broken(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\necho gone >&2\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(ConfigError, match="failed with status 3: gone"):
        versions(tmp_path / "python", ())
    with pytest.raises(ConfigError, match="cannot be run: No such file"):
        versions(tmp_path / "nothing", ())
