"""The whole server over HTTP: random weights with a real tokenizer, served, put under load and disturbed."""

from __future__ import annotations

import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from engine.device.device_memory import free_bytes
from gpu_checks.check import Check
from gpu_checks.models import sure_module
from gpu_checks.product.failures import cancelled_streams, full_card, killed_engine, second_server
from gpu_checks.product.load import measure
from gpu_checks.product.serving import Served
from gpu_checks.tokens import save_tokenizer

PART = "server"
NAME = "Qwen3-0.6B"
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
# Prompt and answer tokens of a load, and its options of ``castor bench``.
LOADS = {
    "128/128": "--scenario R2 --streams 1 --streams 64 --prompt-tokens 128 --tokens 128 --requests 1 --seconds 3",
    "1024/128": "--scenario R2 --streams 64 --prompt-tokens 1024 --tokens 128 --requests 1 --seconds 3",
}
TINY = {"8/2": "--scenario R2 --streams 1 --streams 2 --prompt-tokens 8 --tokens 2 --requests 1 --seconds 0"}


def run(check: Check) -> None:
    """Write a model, serve it, measure, disturb, stop; or report which packages are missing."""
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
        free_before = free_bytes(check.machine.device)
        check.report.doing(f"{PART}: starting the server")
        served = Served(check, folder, place, "server")
        try:
            ready = served.wait_until_ready(check.budget.left)
            if ready is None:
                check.report.failed(PART, "the server", f"it does not get ready: {served.last_lines()}")
                return
            check.report.number(PART, "start of the server until it is ready", ready, "s")
            for lengths, options in (TINY if check.machine.smoke else LOADS).items():
                measure(check, served, lengths, options.split(), place / f"results-{lengths.replace('/', '-')}")
            cancelled_streams(check, served)
            full_card(check, served)
            killed_engine(check, served)
            second_server(check, served, folder, place, free_before)
        finally:
            served.end()


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
