"""A request to an engine."""

from __future__ import annotations

from dataclasses import dataclass

from engine.api.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to continue it.

    ``prompt`` holds token ids (at least one). ``salt`` separates tenants in the prefix cache: equal prompts share
    blocks only under equal salts. ``deadline`` is a ``time.monotonic()`` instant: all processes of a machine share it.
    Later requests of the conversation are expected to have the first tokens of this prompt in common with it, as many
    as one of ``resume_points`` says: models with recurrent states keep a copy of them there.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    candidates: int = 1
    salt: str = ""
    deadline: float | None = None
    resume_points: tuple[int, ...] = ()
