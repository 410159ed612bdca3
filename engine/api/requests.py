"""What an engine is asked: requests, and how their tokens are chosen."""

from __future__ import annotations

from dataclasses import dataclass

# --- Requests ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Thinking:
    """Where thoughts stand in the sampled tokens, and how many there may be.

    ``start`` and ``end`` are the token ids of the markers around thoughts; ``open`` tells that the prompt already wrote
    the start. After ``budget`` tokens of thoughts (None: free) the end is forced and the answer follows.
    """

    start: tuple[int, ...]
    end: tuple[int, ...]
    open: bool = False
    budget: int | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of a request are chosen; every candidate of a request shares it.

    ``temperature`` 0 means greedy. ``top_k`` 0 and ``top_p`` 1 switch the filter off. ``logprobs`` is None
    (none wanted) or the number of top candidates, 0 to 20, beside the chosen token. ``stop`` are strings that end the
    answer and are not part of it; ``stop_ids`` are tokens that end it (end of turn) and are never reported. Stop
    strings do not count in thoughts, nor between the pairs of ``stop_exempt`` (the beginning and the end of a call).

    ``grammar`` is an llguidance grammar (Lark or JSON) that the answer, after any thoughts, must follow. ``markers``
    are special tokens whose content stays in the text, because the caller's parser looks for it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    grammar: str | None = None
    thinking: Thinking | None = None
    markers: tuple[int, ...] = ()
    stop_exempt: tuple[tuple[str, str], ...] = ()


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
