"""What counts as a failure at the engine's boundaries, and how to say it in one line."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager

from engine.api.errors import EngineUnavailable, ModelRefused

NOT_FAILURES = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)
"""Re-raised at a boundary, which otherwise catches ``BaseException``: a panic of Rust code (tokenizers, llguidance,
safetensors) is raised as an exception that is not an ``Exception``."""


_OF_THE_MOMENT = re.compile(
    r"out of memory|can't allocate memory|can't start new thread|\b(CUDA|driver|NVML) error", re.IGNORECASE
)
"""What torch and Python say of memory, threads and devices, in errors that have no type of their own."""
_OF_THE_FILES = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


def may_pass(error: BaseException) -> bool:
    """Whether the same attempt may succeed a moment later: memory, devices and disks come back, files and code stay."""
    if isinstance(error, OSError):
        return not isinstance(error, _OF_THE_FILES)
    return isinstance(error, (MemoryError, EngineUnavailable)) or bool(_OF_THE_MOMENT.search(str(error)))


def first_line(error: BaseException) -> str:
    """The message of an error without the trace or the advice that libraries append; may be empty."""
    return str(error).strip().partition("\n")[0]


def sentence(error: BaseException) -> str:
    """What was raised as one line for people; the trace goes to the log."""
    line = first_line(error)
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


@contextmanager
def refused_as(message: str) -> Iterator[None]:
    """Raise ``ModelRefused(message: error)`` for whatever a library raises on the files of a model.

    Broad because what parsers raise on a broken file cannot be listed. For library calls only: errors of the engine's
    own code must stay visible as such. A refusal that is raised on the way is passed on.
    """
    try:
        yield
    except (ModelRefused, *NOT_FAILURES):
        raise
    except BaseException as error:
        raise ModelRefused(f"{message}: {sentence(error)}") from error
