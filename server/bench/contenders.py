"""The servers of a benchmark: Castor itself and its peers, each started alone, ready, and ended by its process id."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.sources import GgufSource, PackageSource
from server.bench.client import BaseUrl, HttpError, get
from server.bench.load import Target
from server.bench.protocols import Dialect, Gemini, OpenAi
from server.registry import weights_of
from server.settings import ConfigError, Settings
from server.spec import ModelSpec

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, where the programs of benchmarks/ and the environments of the peers are."""

ENVIRONMENTS = ROOT / ".bench-envs"
PROGRAMS = ROOT / "benchmarks"
START_SECONDS = 300.0
STOP_SECONDS = 30.0
PEERS = ("llama.cpp", "transformers")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a server must have room for: streams at once, and tokens of prompt and answer in each."""

    slots: int
    context: int
    threads: int


@dataclass(frozen=True, slots=True)
class Contender:
    """A kind of server. ``command`` makes its command line for a port and sizes; ``weights`` is what it reads.

    ``python`` is the interpreter of its environment, ``packages`` are those whose versions matter.
    """

    name: str
    dialect: Dialect
    model: str
    ready_path: str
    command: Callable[[int, Sizes], list[str]]
    weights: Path
    python: Path
    packages: tuple[str, ...]


def castor(spec: ModelSpec, settings: Settings, models: Path) -> Contender:
    """This very Castor, with the entry ``spec`` of the file ``models``."""
    folder = weights_of(spec, settings.cache_dir)

    def command(port: int, _sizes: Sizes) -> list[str]:
        options = ["--host", "127.0.0.1", "--port", str(port), "--models", str(models)]
        return [sys.executable, "-m", "server.cli", "serve", *options, "--cache-dir", str(settings.cache_dir)]

    python = Path(sys.executable)
    packages = ("castor-serve", "torch", "transformers", "tokenizers", "llguidance", "uvicorn", "starlette")
    return Contender("castor", Gemini(), spec.name, "/readyz", command, folder, python, packages)


def peer(name: str, spec: ModelSpec, settings: Settings) -> Contender:
    """One of ``PEERS`` with the same weights as Castor. Raises ``ConfigError`` where it is not installed."""
    if name not in PEERS:
        raise ConfigError(f"the peer {name!r} is unknown; there are {', '.join(PEERS)}")
    python = ENVIRONMENTS / name / "bin" / "python"
    if not python.exists():
        raise ConfigError(f"the peer {name} is not installed; run: ./scripts/bench --peer {name}")
    return _llama_cpp(python, spec, settings) if name == "llama.cpp" else _transformers(python, spec, settings)


def _llama_cpp(python: Path, spec: ModelSpec, settings: Settings) -> Contender:
    gguf = gguf_file(spec, settings)
    program = str(PROGRAMS / "llama_cpp_server.py")

    def command(port: int, sizes: Sizes) -> list[str]:
        numbers = map(str, (port, sizes.slots, sizes.context, sizes.threads))
        return [str(python), program, str(gguf), *numbers]

    return Contender("llama.cpp", OpenAi(), "castor-bench", "/health", command, gguf, python, ("xllamacpp",))


def _transformers(python: Path, spec: ModelSpec, settings: Settings) -> Contender:
    folder = weights_of(spec, settings.cache_dir)

    def command(port: int, _sizes: Sizes) -> list[str]:
        dtype = "float32" if spec.dtype == "auto" else spec.dtype
        options = ["--continuous-batching", "--dtype", dtype, "--device", spec.device, "--host", "127.0.0.1"]
        return [str(python.with_name("transformers")), "serve", str(folder), *options, "--port", str(port)]

    packages = ("transformers", "torch", "fastapi", "uvicorn")
    return Contender("transformers", OpenAi(), str(folder), "/health", command, folder, python, packages)


def gguf_file(spec: ModelSpec, settings: Settings) -> Path:
    """The GGUF file that an entry was converted from. Raises ``ConfigError`` for an entry that never had one."""
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
    """The server, ready, for the length of the block. Raises ``ConfigError`` with the end of its log if it fails."""
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="castor-bench-") as name, (Path(name) / "log").open("w+b") as log:
        # Settings of the operator's own server, its keys above all, are none of the benchmark's business.
        ours = {key: value for key, value in os.environ.items() if not key.startswith("CASTOR_")}
        environment = {**ours, "CASTOR_DATA": name, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        command = contender.command(port, sizes)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=ROOT)
        url = BaseUrl("http", "127.0.0.1", port, "")
        try:
            _wait_until_ready(contender, process, url, Path(log.name))
            yield Target(contender.name, url, contender.dialect, contender.model, pid=process.pid)
        finally:
            _end(process)


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """The installed versions in the environment of an interpreter; what is not there is left out."""
    code = (
        "import sys, importlib.metadata as m\n"
        "have = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print('python', sys.version.split()[0])\n"
        "[print(p, have[p]) for p in sys.argv[1:] if p in have]"
    )
    done = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, timeout=60, check=True)
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def _wait_until_ready(contender: Contender, process: subprocess.Popen[bytes], url: BaseUrl, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not asyncio.run(_is_ready(url, contender.ready_path)):
        status = process.poll()
        if status is not None:
            raise ConfigError(f"{contender.name} ended with status {status} before it was ready: {_tail(log)}")
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


def _tail(log: Path) -> str:
    """The last lines of a log on one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-5:]) or "it said nothing"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
