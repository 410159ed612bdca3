"""transformers, which renders prompts and splits answers: how new it must be, and its one import.

It is imported with torch hidden from it: what is used here works the same, and the process stays small (122 MB and 1.6
s instead of 458 MB and 7 s).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from threading import Lock
from typing import Any

from server.config.errors import ConfigError

OLDEST = (5, 23)
"""Older ones take ``sanitize_control_tokens`` for a template variable, so users could write control tokens."""

_importing = Lock()


@dataclass(frozen=True, slots=True)
class Library:
    """What the server uses of transformers: the class of tokenizers, the module that parses answers, and what gives the
    compiled template for the text of one, the same object that tokenizers render with."""

    tokenizers: Any
    chat_parsing: Any
    compiled_template: Callable[[str], Any]


def require_library() -> None:
    """Raise ``ConfigError`` where transformers is missing or too old. Imports nothing, so that it costs no time."""
    try:
        number = version("transformers")
        installed = f"transformers {number} is installed"
    except PackageNotFoundError:
        number, installed = "", "transformers is not installed"
    if tuple(map(int, re.findall(r"\d+", number)[:2])) < OLDEST:
        needed = f"transformers>={'.'.join(map(str, OLDEST))}"
        raise ConfigError(
            f"{installed}, but the server needs {needed}, which keeps control tokens out of the text of users: "
            f"run `{sys.executable} -m pip install '{needed}'`"
        )


def library() -> Library:
    """transformers, imported by the first caller while the others wait: concurrent imports would see it half loaded.

    The import is complete: whatever the server does with it afterwards, in any thread, imports nothing more. The next
    caller retries one that failed.
    """
    with _importing:
        return _imported()


@cache
def _imported() -> Library:
    hidden = not {"torch", "transformers"} & sys.modules.keys()  # a process that has either already keeps it
    if hidden:
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch
        sys.modules["torch"] = None  # type: ignore[assignment]  # the import system's own way to say "not there"
    try:
        from transformers import PreTrainedTokenizerFast
        from transformers.utils import chat_parsing, chat_template_utils, is_torch_available, logging

        logging.set_verbosity_error()
        logging.disable_default_handler()  # what it says goes into the server's log
        logging.enable_propagation()
        assert not (hidden and is_torch_available())  # it checks once, so this stays true
    finally:
        if hidden:
            del sys.modules["torch"]
    return Library(PreTrainedTokenizerFast, chat_parsing, chat_template_utils._compile_jinja_template)
