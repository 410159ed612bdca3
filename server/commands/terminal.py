"""What the command prints for people, on stderr: errors, progress, and how to use the server that has just started."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from engine.api.engine import EngineState
from server.config.settings import Settings
from server.models.registry import Registry

POLL_SECONDS = 0.2
ROOT = Path(__file__).resolve().parents[2]
DEFAULT_URL = "http://127.0.0.1:8080"
_QUESTION = {
    "contents": [{"parts": [{"text": "What is the capital of France?"}]}],
    "generationConfig": {"maxOutputTokens": 100},
}


def console() -> Console:
    """Standard error: a terminal or a log."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def castor_command() -> str:
    """How this user calls the command: by its name where that is on the PATH, else by the script of this checkout."""
    script = ROOT / "scripts" / "castor"
    if shutil.which("castor") or not script.is_file():
        return "castor"
    return f"./{script.relative_to(Path.cwd())}" if script.is_relative_to(Path.cwd()) else str(script)


def os_sentence(error: OSError) -> str:
    """An error of the operating system in one sentence."""
    if error.errno == errno.ENOSPC:
        return "the disk is full: free some space, or choose another place with --cache-dir"
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"


class Bars:
    """A line of progress for each of several things: bars on a terminal, else a line whenever a step begins."""

    def __init__(self, terminal: Console, progress: Progress | None) -> None:
        self._terminal = terminal
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, str] = {}

    def show(self, name: str, step: str, share: float) -> None:
        """``name`` is at ``share`` (0 to 1) of ``step``."""
        if self._progress is not None:
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=1.0, step=step)
            self._progress.update(self._tasks[name], completed=share, step=step)
        elif step and self._printed.get(name) != step:
            self._printed[name] = step
            self._terminal.print(f"{name}: {step}", soft_wrap=True)


@contextmanager
def bars(terminal: Console) -> Iterator[Bars]:
    """Progress lines for the length of the block; on a terminal they are gone afterwards."""
    if not terminal.is_terminal:
        yield Bars(terminal, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[step]}"), console=terminal, transient=True) as progress:
        yield Bars(terminal, progress)


async def watch_loading(registry: Registry, terminal: Console) -> bool:
    """Show the loading progress until every model is ready or has failed once; return whether any is ready."""
    loading = registry.required()
    with bars(terminal) as lines:
        while loading := [entry for entry in loading if entry.health().state is EngineState.LOADING]:
            for entry in registry.required():
                health = entry.health()
                lines.show(entry.name, health.detail or str(health.state), health.progress)
            await asyncio.sleep(POLL_SECONDS)
    for entry in registry.required():
        if entry.health().state is EngineState.FAILED:
            terminal.print(f"castor: {entry.name} cannot be served: {entry.health().detail}", soft_wrap=True)
    states = [entry.health().state for entry in registry.required()]
    return not states or EngineState.READY in states


def say_ready(registry: Registry, settings: Settings, port: int, terminal: Console) -> None:
    """Where the server is, what it serves, and a line to try."""
    url = base_url(settings.host, port)
    lines = [f"Castor is ready on {url}"]
    for entry in registry.entries():
        aliases = f" (also as {', '.join(entry.aliases)})" if entry.aliases else ""
        state = "" if entry.health().state is EngineState.READY else f" [{entry.health().state}]"
        lines.append(f"  model  {entry.name}{aliases}{state}")
    first = next((e for e in registry.entries() if e.health().state is EngineState.READY), None)
    if first is not None:
        key = ' -H "x-goog-api-key: $KEY"' if settings.api_keys else ""
        body = f"-H 'content-type: application/json' -d '{json.dumps(_QUESTION)}'"
        elsewhere = "" if url == DEFAULT_URL else f" --url {url}"
        lines.append(f"  chat   {castor_command()} chat{elsewhere}")
        lines.append(f"  try    curl {url}/v1beta/models/{first.name}:generateContent{key} {body}")
    lines += [
        f"  SDKs   base URL {url}, any API key" if not settings.api_keys else f"  SDKs   base URL {url}",
        '  agents gemini-cli also needs "selectedType": "gemini-api-key" in its settings, see README.md',
        "  logs   here on stderr, one JSON line each",
    ]
    terminal.print("\n".join(lines), soft_wrap=True)


def base_url(host: str, port: int) -> str:
    """The URL under which a client on this machine reaches a server bound to ``host``."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}"


def reporter(lines: Bars, name: str) -> Callable[[str, float], None]:
    """A progress callback ``(step, share)`` for one thing."""
    return lambda step, share: lines.show(name, step, share)
