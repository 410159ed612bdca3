"""The environment of a run: machine, system, versions, commit; nothing secret, no names of people or places."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.api.machine import cores

SECRET_OPTIONS = ("--api-key",)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def describe(command: Sequence[str], packages: Mapping[str, Mapping[str, str]], root: Path) -> dict[str, Any]:
    """The environment of a run as JSON. ``packages`` are the versions for each server, ``root`` is the checkout.

    ``load_average`` is taken before the run: what else the machine was doing.
    """
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    # The kernel without what its builder added to the version.
    system = f"{platform.system()} {platform.release().split('-')[0]}"
    with suppress(OSError):
        system = f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {system}"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": public_command(command),
        **_commit(root),
        "cpu": found[1] if found else platform.processor() or platform.machine(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": round(os.getloadavg()[0], 2),
        "variables": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "system": system,
        "python": platform.python_version(),
        "packages": {server: dict(versions) for server, versions in packages.items()},
    }


def public_command(command: Sequence[str]) -> str:
    """The command line without keys, and with file names in place of paths."""
    words, hidden = [], False
    for word in command:
        option, equals, value = word.partition("=")
        if hidden:
            words.append("***")
        elif option in SECRET_OPTIONS and equals:
            words.append(f"{option}=***")
        else:
            words.append(f"{option}{equals}{_without_folders(value)}" if equals else _without_folders(word))
        hidden = word in SECRET_OPTIONS
    return " ".join(words)


def _without_folders(word: str) -> str:
    return Path(word).name if word.startswith(("/", "~", "./", "../")) else word


def _commit(root: Path) -> dict[str, Any]:
    """The commit and the number of changed files; empty where ``root`` is installed inside another repository."""
    top = _git(root, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root.resolve():
        return {"commit": "", "changed_files": 0}
    changed = _git(root, "status", "--porcelain", "--untracked-files=no").splitlines()
    return {"commit": _git(root, "rev-parse", "HEAD"), "changed_files": len(changed)}


def _git(root: Path, *args: str) -> str:
    """What git says, or nothing where there is no repository or no git."""
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
