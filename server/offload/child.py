"""The program of a child process that works for the server and may be killed at any time: jobs in, results out.

``python -m server.offload.child MEMORY``, in bytes. Started by `children.py`, which says how the two speak.
"""

from __future__ import annotations

import os
import pickle
import resource
import struct
import sys
from contextlib import suppress
from typing import Any, BinaryIO

import msgspec

from server.errors import InvalidArgument

LENGTH = struct.Struct("<Q")
READY, RESULT, REFUSAL, FAILURE = b"r", b"=", b"!", b"?"
"""What a message of the child starts with: it is ready; the job's result; its ``InvalidArgument``; any other
failure."""
EXIT_MEMORY = 4
"""The exit status of a child whose job needs more memory than it has."""

_FIRST_KILLED = b"1000"
"""When a machine or a container runs out of memory, the system kills this process first."""


def main() -> None:
    """Do jobs until the input ends."""
    jobs, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not become an answer
    memory = int(sys.argv[1])
    for what, limit in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        with suppress(ValueError, OSError):  # a system without this limit
            resource.setrlimit(what, (limit, limit))
    with suppress(OSError), open("/proc/self/oom_score_adj", "wb") as score:
        score.write(_FIRST_KILLED)
    _say(answers, READY, None)
    while head := jobs.read(LENGTH.size):
        try:
            seconds, work, arguments = pickle.loads(jobs.read(LENGTH.unpack(head)[0]))
            _limit_time(seconds)
            _say(answers, RESULT, work(*arguments))
        except InvalidArgument as refusal:
            _say(answers, REFUSAL, (refusal.message, refusal.violations))
        except MemoryError:
            sys.exit(EXIT_MEMORY)
        except BaseException as error:  # noqa: BLE001 - a panic of Rust code is no Exception
            _say(answers, FAILURE, f"{type(error).__name__}: {error}"[:1000])


def _say(answers: BinaryIO, kind: bytes, content: Any) -> None:
    body = msgspec.msgpack.encode(content)
    answers.write(kind + LENGTH.pack(len(body)) + body)
    answers.flush()


def _limit_time(seconds: float) -> None:
    """In case the parent has died and cannot kill this process: the system ends what computes for longer."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = int(used.ru_utime + used.ru_stime + 2 * seconds) + 2
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    main()
