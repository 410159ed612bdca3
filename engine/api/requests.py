"""A request to an engine."""

from __future__ import annotations

from dataclasses import dataclass

from engine.api.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to continue it.

    ``prompt`` holds token ids (at least one). ``salt`` separates tenants in the prefix cache: equal prompts share
    blocks only under equal salts. ``deadline`` is a ``time.monotonic()`` instant: all processes of a machine share it.
    The first ``repeated_prefix`` tokens of the prompt are those that the next turn of the conversation is expected to
    begin with: models with recurrent states keep a copy of them there.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    candidates: int = 1
    salt: str = ""
    deadline: float | None = None
    repeated_prefix: int = 0
