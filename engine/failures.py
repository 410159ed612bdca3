"""What counts as a failure at the engine's boundaries, and how to say it in one line."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from engine.api.errors import ModelRefused

NOT_FAILURES = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)
"""Re-raised at a boundary, which otherwise catches ``BaseException``: a panic of Rust code (tokenizers, llguidance,
safetensors) is raised as an exception that is not an ``Exception``."""


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
