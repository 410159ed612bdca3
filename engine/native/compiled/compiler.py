"""The sources of the C code, the compiler of this machine, and how it compiles them."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from engine.native.errors import NotNative

SOURCE = Path(__file__).parents[1] / "forward.c"
HEADERS = tuple(sorted(path.name for path in SOURCE.parent.glob("*.h")))
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-Wno-psabi")
LIBRARIES = ("-lm", "-lpthread")
COMPILE_SECONDS = 300


def find_compiler() -> list[str]:
    """The command that compiles C: ``CC``, which may contain options and wrappers, or one of the usual names."""
    for command in (shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"], ["clang"]):
        if command and (path := shutil.which(command[0])):
            return [path, *command[1:]]
    raise NotNative("there is no C compiler; install gcc or clang")


def compile_code(compiler: list[str], choices: Iterable[tuple[str, ...]], target: Path) -> None:
    """With the first of the ``choices`` of options that the compiler takes. Raises ``NotNative`` with its reason."""
    output = ""
    for options in choices:
        result = run([*compiler, *FLAGS, *options, "-o", str(target), str(SOURCE), *LIBRARIES])
        if result.returncode == 0:
            return
        output = result.stderr
    reason = (output.strip().splitlines() or ["no reason given"])[0]
    raise NotNative(f"{shlex.join(compiler)} cannot compile {SOURCE.name}: {reason}")


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """What a compiler says. Raises ``NotNative`` where it cannot be run or does not end."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired:
        raise NotNative(f"{command[0]} did not end within {COMPILE_SECONDS} s") from None
    except OSError as error:
        raise NotNative(f"{command[0]} cannot be run: {error}") from error


def fingerprint(*options: str) -> str:
    """A hash of the sources, of the flags, and of what else the code is compiled for or with."""
    content = hashlib.sha256("\n".join((*FLAGS, *options)).encode())
    for name in (SOURCE.name, *HEADERS):
        content.update(SOURCE.with_name(name).read_bytes())
    return content.hexdigest()[:16]
