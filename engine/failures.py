"""What a border of the engine takes for a failure: all that is raised, but for what ends or unwinds the interpreter."""

from __future__ import annotations

import asyncio

NOT_FAILURES = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)
"""Passed on by a border, which then catches ``BaseException``: a panic of Rust code (tokenizers, llguidance,
safetensors) comes as an exception that is no ``Exception``."""


def sentence(error: BaseException) -> str:
    """What was raised as one line for people; the trace goes to the log."""
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
