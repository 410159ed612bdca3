"""The servers of a benchmark: Castor itself and its peers, each started alone and ended by its process id."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.machine import Choice, computes_on_gpu, llama_cpp_build
from benchmarks.harness.programs import ROOT, output_of
from engine.weights.sources import GgufSource, PackageSource
from server.bench.load import Target
from server.bench.wire.client import BaseUrl, HttpError, get
from server.bench.wire.protocols import Dialect, Gemini, OpenAi
from server.config.errors import ConfigError
from server.config.models_file import ModelSpec
from server.config.settings import Settings
from server.models.registry import weights_of

ENVIRONMENTS = ROOT / ".bench-envs"
PROGRAMS = ROOT / "benchmarks"
START_SECONDS = 300.0
STOP_SECONDS = 30.0
ASK_SECONDS = 60.0
PORTS = range(20_000, 32_768)
"""Below the range of ephemeral ports, so that no client takes a port between our check and the server's bind."""
PORT_TRIES = 3
LLAMA_CPP = ("llama.cpp", "llama.cpp-native")
"""The package's wheel, which runs on most processors, and the same release compiled for this one."""
PEERS = (*LLAMA_CPP, "transformers")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a server must have room for: concurrent streams, and tokens of prompt and answer in each."""

    slots: int
    context: int
    threads: int


@dataclass(frozen=True, slots=True)
class Contender:
    """A kind of server. ``command`` builds its command line for a port and sizes; ``weights`` is what it loads.

    ``python`` is the interpreter of its environment, ``packages`` are those whose versions matter. ``build`` is the
    processor features that it reports to be compiled for.
    """

    name: str
    dialect: Dialect
    model: str
    ready_path: str
    command: Callable[[int, Sizes], list[str]]
    weights: Path
    python: Path
    packages: tuple[str, ...]
    build: str = ""


def castor(spec: ModelSpec, settings: Settings, models: Path) -> Contender:
    """Castor of this checkout, with the entry ``spec`` of the file ``models``."""
    folder = weights_of(spec, settings.cache_dir)
    # Servers start in the checkout: relative paths from another folder must mean the same there.
    models, cache = models.resolve(), settings.cache_dir.resolve()

    def command(port: int, _sizes: Sizes) -> list[str]:
        options = ["--host", "127.0.0.1", "--port", str(port), "--models", str(models)]
        return [sys.executable, "-m", "server.cli", "serve", *options, "--cache-dir", str(cache)]

    python = Path(sys.executable)
    packages = ("castor-serve", "torch", "transformers", "tokenizers", "llguidance", "uvicorn", "starlette")
    return Contender("castor", Gemini(), spec.name, "/readyz", command, folder, python, packages)


def peer(name: str, spec: ModelSpec, settings: Settings, choice: Choice) -> Contender:
    """One of ``PEERS`` with Castor's weights, on its device. Raises ``ConfigError`` where that is impossible."""
    if name not in PEERS:
        raise ConfigError(f"the peer {name!r} is unknown; there are {', '.join(PEERS)}")
    python = ENVIRONMENTS / name / "bin" / "python"
    if not python.exists():
        raise ConfigError(f"the peer {name} is not installed; run: ./scripts/bench --peer {name}")
    if name in LLAMA_CPP:
        return _llama_cpp(name, python, spec, settings, choice)
    return _transformers(python, spec, settings, choice)


def _llama_cpp(name: str, python: Path, spec: ModelSpec, settings: Settings, choice: Choice) -> Contender:
    gguf = gguf_file(spec, settings).resolve()
    build = llama_cpp_build(name, python)
    if choice.device != "cpu" and not computes_on_gpu(build):
        raise ConfigError(
            f"Castor would compute on {choice.device}, but this {name} is built for CPUs only: leave this peer out, or "
            f"set `device: cpu` for {spec.name} in models.yaml"
        )
    program = str(PROGRAMS / "llama_cpp_server.py")

    def command(port: int, sizes: Sizes) -> list[str]:
        numbers = map(str, (port, sizes.slots, sizes.context, sizes.threads))
        return [str(python), program, str(gguf), *numbers]

    return Contender(name, OpenAi(), "castor-bench", "/health", command, gguf, python, ("xllamacpp",), build)


def _transformers(python: Path, spec: ModelSpec, settings: Settings, choice: Choice) -> Contender:
    from benchmarks.harness.float_model import float_folder  # it takes torch, which other peers do without

    folder = float_folder(weights_of(spec, settings.cache_dir).resolve(), settings.cache_dir)

    def command(port: int, _sizes: Sizes) -> list[str]:
        options = ["--continuous-batching", "--dtype", choice.dtype(spec), "--device", choice.device]
        options += ["--host", "127.0.0.1"]
        return [str(python.with_name("transformers")), "serve", str(folder), *options, "--port", str(port)]

    packages = ("transformers", "torch", "fastapi", "uvicorn")
    return Contender("transformers", OpenAi(), str(folder), "/health", command, folder, python, packages)


def gguf_file(spec: ModelSpec, settings: Settings) -> Path:
    """The GGUF file that an entry was converted from. Raises ``ConfigError`` for an entry without one."""
    source = spec.where()
    if isinstance(source, PackageSource):
        return settings.cache_dir / "files" / f"{spec.sha256}.gguf"
    if isinstance(source, GgufSource):
        return source.path
    raise ConfigError(
        f"llama.cpp needs a GGUF file, but the source of {spec.name} is {spec.source}; leave this peer out"
    )


@contextmanager
def started(contender: Contender, sizes: Sizes) -> Iterator[Target]:
    """The server, ready for the duration of the block. Raises ``ConfigError`` with the end of its log if it fails."""
    with tempfile.TemporaryDirectory(prefix="castor-bench-") as name:
        # Settings of the operator's own server, its keys above all, must not reach the benchmark.
        ours = {key: value for key, value in os.environ.items() if not key.startswith("CASTOR_")}
        # All get the same threads: Castor and transformers read the variable, llama.cpp gets an option.
        ours |= {
            "CASTOR_DATA": name,
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": str(sizes.threads),
        }
        process, url = _start(contender, sizes, ours, Path(name) / "log")
        try:
            yield Target(contender.name, url, contender.dialect, contender.model, pid=process.pid)
        finally:
            _end(process)


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """The installed versions in the environment of an interpreter; missing packages are left out."""
    code = (
        "import sys, importlib.metadata as m\n"
        "have = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print('python', sys.version.split()[0])\n"
        "[print(p, have[p]) for p in sys.argv[1:] if p in have]"
    )
    said = output_of(
        f"the Python of {python.parent.parent.name}", [str(python), "-c", code, *packages], "", ASK_SECONDS
    )
    return dict(line.split(" ", 1) for line in said.splitlines())


def _start(
    contender: Contender, sizes: Sizes, environment: Mapping[str, str], log: Path
) -> tuple[subprocess.Popen[bytes], BaseUrl]:
    """The process and where it is ready; on another port if the first one was taken meanwhile."""
    for last in (*[False] * (PORT_TRIES - 1), True):
        url = BaseUrl("http", "127.0.0.1", _free_port(), "")
        command = contender.command(url.port, sizes)
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, cwd=ROOT
            )
        try:
            _wait_until_ready(contender, process, url, log)
            return process, url
        except BaseException as failure:
            _end(process)
            if last or not isinstance(failure, ConfigError) or _is_free(url.port):
                raise
    raise AssertionError("the last try returns or raises")


def _wait_until_ready(contender: Contender, process: subprocess.Popen[bytes], url: BaseUrl, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        ready = asyncio.run(_is_ready(url, contender.ready_path))
        status = process.poll()  # polled last: on the port of a dead process another one may answer
        if status is not None:
            raise ConfigError(f"{contender.name} ended with status {status} before it was ready: {_tail(log)}")
        if ready:
            return
        if time.monotonic() > deadline:
            raise ConfigError(f"{contender.name} was not ready within {START_SECONDS:.0f} s: {_tail(log)}")
        time.sleep(0.2)


async def _is_ready(url: BaseUrl, path: str) -> bool:
    try:
        async with asyncio.timeout(5):
            status, _ = await get(url, path, {})
    except (OSError, HttpError, TimeoutError):
        return False
    return status == 200


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_SECONDS)
    finally:
        process.kill()  # a second Ctrl-C ends the wait, but must not leave a server behind either


def _tail(log: Path) -> str:
    """The last lines of a log on one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-5:]) or "its log is empty"


def _free_port() -> int:
    while not _is_free(port := secrets.choice(PORTS)):  # not from a seed that another program may share
        pass
    return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: closed connections of the previous one must not block the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
