"""What an engine is asked."""

from __future__ import annotations

from dataclasses import dataclass

from engine.api.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and what to make of it.

    ``prompt`` holds token ids (at least one). ``salt`` separates tenants in the prefix cache: equal prompts share
    pages only under equal salts. ``deadline`` is a ``time.monotonic()`` instant: all processes of a machine share it.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    candidates: int = 1
    salt: str = ""
    deadline: float | None = None
