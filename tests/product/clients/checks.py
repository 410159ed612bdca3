"""What the checks of every Python client have in common: models, prompts, and the report that is read.

A check is a function named check_*. The server has the models of models.yaml, and ``ENDLESS``, which writes for as long
as it may; it sends a keep-alive after every twentieth of a second of silence.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import secrets
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Failure = TypeVar("Failure", bound=Exception)

MODEL = "smollm2-135m-instruct"
ENDLESS = "endless"
QUESTION = "What is the capital of France?"


def long_prompt() -> str:
    """Its prefill takes about a second, because it begins as no prompt before it did: a silence."""
    return f"{secrets.token_hex(8)} " + "river stone lantern market copper window garden thunder " * 230


def failure(kind: type[Failure], call: Callable[[], object]) -> Failure:
    """What ``call`` fails with."""
    try:
        call()
    except kind as failed:
        return failed
    raise AssertionError(f"no {kind.__name__}")


def report(version: str, checks: Mapping[str, Any], *given: Any) -> None:
    """Run the checks among ``checks``, in their order, and print what became of them as one line of JSON."""
    outcome: dict[str, str] = {}
    for name, check in checks.items():
        if not name.startswith("check_"):
            continue
        try:
            made = check(*given)
            if inspect.iscoroutine(made):
                asyncio.run(made)
            outcome[name] = "ok"
        except Exception:
            outcome[name] = traceback.format_exc(limit=-4)
    print(json.dumps({"version": version, "outcome": outcome}))
