"""How the tokens of a request are chosen, and the one table of the numbers that shape their distribution."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Thinking:
    """Where the sampled tokens are thoughts, and how many thoughts there may be.

    ``start`` and ``end`` are the token ids of the markers around thoughts; ``open`` means that the prompt already holds
    the start. After ``budget`` tokens of thoughts (None: no limit) the end is forced and the answer follows.
    """

    start: tuple[int, ...]
    end: tuple[int, ...]
    open: bool = False
    budget: int | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of a request are chosen; every candidate of a request shares it.

    ``temperature`` 0 means greedy. ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and ``repetition_penalty`` 1 switch these off.
    ``logprobs`` is None (none wanted) or the number of top candidates, 0 to 20, beside the chosen token. ``stop`` are
    strings that end the answer and are not part of it; ``stop_ids`` are tokens that end it (end of turn) and are never
    reported. Stop strings do not count in thoughts, nor between the pairs of ``stop_exempt`` (the beginning and the end
    of a call).

    ``grammar`` is an llguidance grammar (Lark or JSON) that the answer, after any thoughts, must follow. ``markers``
    are special tokens whose content stays in the text, because the caller's parser looks for it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    grammar: str | None = None
    thinking: Thinking | None = None
    markers: tuple[int, ...] = ()
    stop_exempt: tuple[tuple[str, str], ...] = ()


_DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in fields(SamplingParams)}


@dataclass(frozen=True, slots=True)
class Range:
    """Finite numbers from ``low`` to ``high``, both included, or above ``low`` if it is ``excluded``."""

    low: float | None = None
    high: float | None = None
    excluded: bool = False

    def __contains__(self, number: float) -> bool:
        low = -sys.float_info.max if self.low is None else self.low
        high = sys.float_info.max if self.high is None else self.high
        return low <= number <= high and not (self.excluded and number == low)

    def __str__(self) -> str:
        """The range in words, to follow "a number"; ``low`` must be set."""
        if self.high is not None:
            return f"from {self.low:g} to {self.high:g}"
        return f"{'above' if self.excluded else 'of at least'} {self.low:g}"


@dataclass(frozen=True, slots=True)
class SamplingField:
    """A number of ``SamplingParams`` that shapes the distribution, with the default that it has there.

    ``computed`` is what the engine can compute, ``advice`` what its refusal asks for. ``asked`` is what requests and
    models.yaml may ask for. ``wire_name`` is the field of generationConfig; without one, requests cannot set it.
    ``in_entry`` means that an entry of models.yaml may set a default of its own. ``switched_on`` is a value that makes
    the sampler do the field's work.
    """

    name: str
    computed: Range
    advice: str
    asked: Range
    switched_on: float
    wire_name: str | None = None
    in_entry: bool = False

    @property
    def default(self) -> float:
        value: float = _DEFAULTS[self.name]
        return value

    @property
    def counts_tokens(self) -> bool:
        """Whether it is a whole number of tokens, so that a value beyond the vocabulary means all of it."""
        return isinstance(self.default, int)


_FIELDS = (
    # engine/sampling/filters
    SamplingField(
        "temperature",
        computed=Range(0),
        advice="give a finite number that is not negative",
        asked=Range(0, 2.0),
        switched_on=1.0,
        wire_name="temperature",
        in_entry=True,
    ),
    SamplingField(
        "top_p",
        computed=Range(0, 1),
        advice="give a number from 0 to 1",
        asked=Range(0, 1),
        switched_on=0.9,
        wire_name="topP",
        in_entry=True,
    ),
    SamplingField(
        "top_k",
        computed=Range(0),
        advice="give 0 (off) or a positive number",
        asked=Range(0),
        switched_on=40,
        wire_name="topK",
        in_entry=True,
    ),
    SamplingField(
        "min_p",
        computed=Range(0, 1),
        advice="give a number from 0 to 1",
        asked=Range(0, 1),
        switched_on=0.05,
        in_entry=True,
    ),
    # engine/sampling/penalties
    SamplingField(
        "repetition_penalty",
        computed=Range(0, excluded=True),
        advice="give a finite number above 0",
        asked=Range(0, excluded=True),
        switched_on=1.1,
        in_entry=True,
    ),
    SamplingField(
        "presence_penalty",
        computed=Range(),
        advice="give a finite number",
        asked=Range(-2, 2),
        switched_on=1.0,
        wire_name="presencePenalty",
    ),
    SamplingField(
        "frequency_penalty",
        computed=Range(),
        advice="give a finite number",
        asked=Range(-2, 2),
        switched_on=1.0,
        wire_name="frequencyPenalty",
    ),
)
SAMPLING_FIELDS: Mapping[str, SamplingField] = {field.name: field for field in _FIELDS}


def everything_on() -> SamplingParams:
    """One token with all that a request may ask of the sampler: the most expensive row there can be."""
    numbers: dict[str, Any] = {field.name: field.switched_on for field in _FIELDS}
    return SamplingParams(max_tokens=1, logprobs=MAX_LOGPROBS, **numbers)
