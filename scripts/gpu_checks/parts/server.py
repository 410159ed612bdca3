"""The whole server over HTTP: a folder of random weights with a real tokenizer, served and put under load."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_checks import goals
from gpu_checks.check import Check
from gpu_checks.models import sure_module
from gpu_checks.tokens import save_tokenizer

PART = "server"
NAME = "Qwen3-0.6B"
ROOT = Path(__file__).resolve().parents[3]
# The modules that the server imports beyond those of the engine's core, and their packages.
NEEDED = {
    "msgspec": "msgspec", "zmq": "pyzmq", "llguidance": "llguidance", "pydantic": "pydantic",
    "pydantic_core": "pydantic-core", "annotated_types": "annotated-types", "typing_inspection": "typing-inspection",
    "starlette": "starlette", "uvicorn": "uvicorn", "httptools": "httptools", "python_multipart": "python-multipart",
    "pypdfium2": "pypdfium2", "structlog": "structlog", "gguf": "gguf", "typer": "typer", "rich": "rich",
    "prometheus_client": "prometheus-client", "yaml": "pyyaml", "jinja2": "jinja2", "safetensors": "safetensors",
}  # fmt: skip
# The first that keeps control tokens out of user text; the server refuses to start below.
TRANSFORMERS = (5, 23)
# The name of a load, and its options of ``castor bench``.
LOADS = {
    "1 and 64 streams, 1024/128": (
        "--scenario R2 --streams 1 --streams 64 --prompt-tokens 1024 --tokens 128 --requests 1 --seconds 4"
    ),
    "8 streams and a prompt of 4,000": "--scenario intrusion --requests 1 --seconds 0",
}
TINY = {
    "1 and 2 streams": "--scenario R2 --streams 1 --streams 2 --prompt-tokens 8 --tokens 2 --requests 1 --seconds 0"
}
_ENDING_SECONDS = 8.0


def run(check: Check) -> None:
    """Write a model, serve it, measure, stop; or report which packages are missing."""
    if missing := missing_packages():
        advice = "scripts/gpu-wheels fetches what an image for CUDA lacks"
        check.report.skipped(PART, "the server", f"missing here: {', '.join(missing)}; {advice}")
        return
    if not check.has_time(PART, "the server", 20.0):
        return
    check.models.forget()
    with tempfile.TemporaryDirectory(prefix="castor-gpu-check-") as name:
        place = Path(name)
        folder = place / "random-model"
        check.report.doing(f"{PART}: writing a model folder")
        module = sure_module(check.machine, NAME)
        module.save_pretrained(folder)
        save_tokenizer(folder, module.config.vocab_size, module.config.max_position_embeddings)
        del module
        check.machine.forget()
        log = place / "server.log"
        process, url = _start(check, folder, place, log)
        try:
            ready = _wait_until_ready(check, process, url)
            if ready is None:
                lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
                end = " | ".join(lines[-4:])[-800:] or "its log is empty"
                check.report.failed(PART, "the server", f"it does not get ready: {end}")
                return
            check.report.number(PART, "start of the server until it is ready", ready, "s")
            for load, options in (TINY if check.machine.smoke else LOADS).items():
                _measure(check, url, load, options.split(), place / "results")
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_ENDING_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(_ENDING_SECONDS)


def missing_packages() -> list[str]:
    """The packages that the server needs and that are not installed."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    try:
        found = version("transformers")
    except PackageNotFoundError:
        found = "0"
    if tuple(int(number) for number in found.split(".")[:2]) < TRANSFORMERS:
        missing.append(f"transformers {'.'.join(map(str, TRANSFORMERS))} (there is {found})")
    return missing


def _start(check: Check, folder: Path, place: Path, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    while True:
        # Below the range of ephemeral ports: no client takes it between this check and the server's bind.
        port = secrets.choice(range(10_000, 32_000))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            break
    command = [sys.executable, "-m", "server.cli", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--data-dir", str(place / "data"), "--cache-dir", str(place / "cache"), "--drain-seconds", "1"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=_environment(), cwd=ROOT
        )
    check.children.append(process)
    return process, f"http://127.0.0.1:{port}"


def _environment() -> dict[str, str]:
    """Our environment, without what is set for this process only or for another server."""
    own = ("TRITON_INTERPRET", "PYTORCH_ALLOC_CONF")
    kept = {name: value for name, value in os.environ.items() if name not in own and not name.startswith("CASTOR_")}
    # Packages on this process's path must be found there too.
    paths = [str(ROOT), *(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path)]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def _wait_until_ready(check: Check, process: subprocess.Popen[bytes], url: str) -> float | None:
    """Seconds until it was ready; None if it ended, or if the part's time ran out."""
    check.report.doing(f"{PART}: starting the server")
    started, opener = time.monotonic(), urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None and check.budget.left > 0:
        try:
            with opener.open(f"{url}/readyz", timeout=5) as answer:
                if answer.status == 200:
                    return time.monotonic() - started
        except (urllib.error.URLError, OSError):
            pass  # not yet
        time.sleep(0.2)
    return None


def _measure(check: Check, url: str, name: str, options: list[str], results: Path) -> None:
    """``castor bench`` from outside, for as long as there is time."""
    if not check.has_time(PART, name, 8.0):
        return
    command = [sys.executable, "-m", "server.cli", "bench", url, *options, "--rounds", "1", "--output", str(results)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_environment(),
        cwd=ROOT,
    )
    check.children.append(process)
    try:
        said, _ = process.communicate(timeout=max(1.0, check.budget.left))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        check.report.skipped(PART, name, "out of time: the load was under way")
        return
    written = sorted(results.glob("*.json"), key=lambda path: path.stat().st_mtime)
    if process.returncode or not written:
        check.report.failed(PART, name, " | ".join(said.decode(errors="replace").strip().splitlines()[-3:]))
        return
    document: dict[str, Any] = json.loads(written[-1].read_text("utf-8"))
    for measurement in document["measurements"]:
        summary = measurement["summary"]
        name = f"{document['scenario']}, {measurement['load']}"
        seconds = {key: summary[key] for key in ("ttft_p50", "itl_p50", "itl_p99") if summary[key] is not None}
        note = ", ".join(f"{key} {value * 1e3:.1f} ms" for key, value in seconds.items())
        if summary["errors"]:
            check.report.failed(PART, name, f"{summary['errors']} of {summary['requests']} requests failed")
        check.report.number(PART, name, summary["output_tokens_per_second"], "tok/s", note, measurement["numbers"])
        if measurement["streams"] == 64 and goals.HTTP.card in check.machine.name:
            check.report.share(goals.HTTP, summary["output_tokens_per_second"])
