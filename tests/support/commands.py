"""Runs ``castor`` several times and imports it once: the calls come as JSON from stdin.

A call has ``run`` (the arguments), ``environment`` and ``folder``; each is a fork of this process, so that it ends as
the command would. On stdout is a list of ``exit``, ``stdout`` and ``stderr``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any, NoReturn

import server.commands.models  # noqa: F401 - what most calls would import, each for itself
from server import cli


def main() -> None:
    """All calls, one after the other."""
    print(json.dumps([_called(call) for call in json.load(sys.stdin)]))


def _called(call: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            _become(call, out.fileno(), errors.fileno())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [os.pread(file.fileno(), 2**20, 0).decode() for file in (out, errors)]
    return {"exit": status, "stdout": texts[0], "stderr": texts[1]}


def _become(call: dict[str, Any], out: int, errors: int) -> NoReturn:
    os.dup2(out, 1)
    os.dup2(errors, 2)
    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    sys.argv = ["castor", *call["run"]]
    code: Any = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code or 0)
